"""Every model class of transformers, trained in ten ways, merged and compared with the live trained model.

`make sweep`, or `python -m sweep --help` with benchmarks/ on the path.
"""
