"""Language models, one architecture a file. The call that the decoders share is in `decoder.py`."""
