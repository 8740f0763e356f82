//! The oracle: the encoding done byte by byte, as the description reads.
