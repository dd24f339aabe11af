"""Contribution Weights for Captum: which tokens made a transformer's output."""

import lazy_loader

# The names are in the stub beside this file. Each is imported when it is first used: what needs no
# model, as the help of the command line, would wait seconds for torch and Captum.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
