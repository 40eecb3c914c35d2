"""Reading and writing files safely: atomic writes, hashes, names and folders of strangers."""
