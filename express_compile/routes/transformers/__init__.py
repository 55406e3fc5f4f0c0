"""The way into models of transformers: its attention interface, its masks, its decoding."""
