"""The encoder's objective and its input: DINO, iBOT and KoLeo losses, masks, crops."""
