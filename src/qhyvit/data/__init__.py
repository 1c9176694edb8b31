"""Pictures in, batches out: decoding, preprocessing, labels, and the built-in data sets."""

from qhyvit.data.dataset import BUILTIN, Batch, Dataset, builtin_credits, open_builtin, open_dataset
from qhyvit.data.preprocessing import Preprocessing

__all__ = ["BUILTIN", "Batch", "Dataset", "Preprocessing", "builtin_credits", "open_builtin", "open_dataset"]
