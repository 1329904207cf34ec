"""Private federated training of multimodal fusion models.

Importing this package loads neither torch nor flwr, so that the command line answers at once.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
