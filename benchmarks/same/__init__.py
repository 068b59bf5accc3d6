"""The parts of `same_bytes.py`: inputs, cases, the run in each checkout, the comparison."""
