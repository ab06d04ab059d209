"Mixed Preference Optimization (MPO) as notebooks and as a library"
__version__ = "0.1.0"
