"""Ways into a model: the ``torch.compile`` backend, captured graphs, transformers' attention interface.

What they keep beside their arguments, and where that is all there is of it:

- of a thread: the record of its sites (``core/sites.py``), who runs the ops (``core/call.py``), the captured call in
  progress (``capture.py``), whether Dynamo traces for us and what it gave up (``dynamo.py``);
- in a module: its ``Capture`` (``capture.py``), with CUDA graphs (``replayed.py``), its ``Site``
  (``transformers/sites.py``), the configurations it had (``transformers/configs.py``);
- in a mask: why it is not proven (``transformers/masks.py``), what it was read as (``transformers/proof.py``);
- of the process: sites by the tokens in compiled graphs (``transformers/sites.py``), what mask functions were proven
  to be (``transformers/mask_functions.py``), how many sites a model has (``passes/place.py``), and the name
  ``"express_compile"`` in transformers' two registers (``transformers/__init__.py``).
"""
