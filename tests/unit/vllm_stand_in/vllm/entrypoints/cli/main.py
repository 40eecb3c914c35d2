"""A command line that prints what it is given."""

import importlib.metadata
import json
import sys


def main():
    assert importlib.metadata.version("vllm")  # as vLLM's own asks
    print(json.dumps(sys.argv))
