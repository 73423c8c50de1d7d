"""Images of one's own, in whatever folders or list they lie: what there is, and which image is for what.

find.py    folders of class folders, with or without train/, val/ and test/
tables.py  CSV, TSV, text and JSON lists
look.py    size, mode and soundness of every image, and which files are copies
split.py   which images are tested on where nobody has said so
index.py   all of it as a table that a run keeps: images.tsv
sets.py    from the table to images in memory or on disk, the only module that imports torch
"""

from allnc.data.own.index import Index, Row, read_index, scan

__all__ = ["Index", "Row", "read_index", "scan"]
