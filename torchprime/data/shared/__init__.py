"""What every part of the data path uses: checked values, notes, worker processes, a cache."""
