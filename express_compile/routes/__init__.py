"""Ways into a model: the ``torch.compile`` backend, captured graphs, transformers' attention interface."""
