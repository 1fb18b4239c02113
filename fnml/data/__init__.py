"""Data: sources, an endless stream of batches whose state is one number, and a feed ahead of it."""

from fnml.data._arrays import ArraySource as ArraySource
from fnml.data._batches import Batches as Batches
from fnml.data._epoch import epoch as epoch
from fnml.data._feed import Feed as Feed
from fnml.data._permute import permute as permute
from fnml.data._permute import random_bits as random_bits
from fnml.data._shared import Shared as Shared
from fnml.data._source import Batch as Batch
from fnml.data._source import Source as Source
from fnml.data._split import Subset as Subset
from fnml.data._split import split as split
from fnml.data._tokens import TokenSource as TokenSource
from fnml.data._write_tokens import write_tokens as write_tokens
