"""Text -> batches."""

from halfbyte.data.calibration import calibration_text
from halfbyte.data.compact import compact
from halfbyte.data.generic import samples_file
from halfbyte.data.loader import (
    Batch,
    BatchLoader,
    Cursor,
    PaddedBatch,
    Worst,
    eval_batches,
    join_batches,
    make_batch,
    to_padded,
)
from halfbyte.data.pack import pack_sequences
from halfbyte.data.preview import Token, token_text, tokens_of
from halfbyte.data.records import Record, RecordReader
from halfbyte.data.template import ChatTemplate, Rendered
from halfbyte.data.tokenize import IGNORE_INDEX, DataReport, Example, TokenizedData, count_overlap, load_data

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchLoader",
    "ChatTemplate",
    "Cursor",
    "DataReport",
    "Example",
    "PaddedBatch",
    "Record",
    "RecordReader",
    "Rendered",
    "Token",
    "TokenizedData",
    "Worst",
    "calibration_text",
    "compact",
    "count_overlap",
    "eval_batches",
    "join_batches",
    "load_data",
    "make_batch",
    "pack_sequences",
    "samples_file",
    "to_padded",
    "token_text",
    "tokens_of",
]  # fmt: skip
