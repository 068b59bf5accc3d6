"""The parts of gpu_parity.py."""
