"""tests/gpu/sanitized.py without a GPU: kernels in Triton's interpreter, "cuda" is the CPU. Shows that its logic works."""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, "tests/gpu")
import contextlib
import torch
from unittest import mock
from torch.overrides import TorchFunctionMode
torch.set_num_threads(1)
G = torch.Generator
class OnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        args = tuple("cpu" if isinstance(a, str) and a == "cuda" else a for a in args)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)
from types import SimpleNamespace
mock.patch.object(torch.cuda, "synchronize", lambda *a: None).start()
mock.patch.object(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)).start()
with OnCPU():
    torch.bfloat16 = torch.float16  # the interpreter has none
    import types
    S = types.ModuleType("sanitized"); S.__file__ = os.path.abspath("tests/gpu/sanitized.py"); sys.modules["sanitized"] = S
    text = open(S.__file__).read()
    for a, b in (("N, LAYER, BF16 = 1000", "N, LAYER, BF16 = 420"), ("s=64", "s=16"), ('"s": 16 if protected else 64', '"s": 16'), ("range(3)", "range(0)"), ("SEEDS = (5, 6, 7)", "SEEDS = (5,)"),
                 ("[0, 700, 700, 701, N]", "[0, 300, 300, 301, N]"), ("starts, 700", "starts, 300"), ("(700, 700, 2, 4", "(200, 200, 1, 4"), ("(300, 727, 1", "(100, 227, 1"), ("thinformer(1024)", "thinformer(256)"), ("tokens(1300", "tokens(500"),  ("1300, 1300", "500, 500"), ("> 500 or", "> 100 or"), ("600, 900, 64)", "100, 200, 64)"), ("Lq=300", "Lq=150"), ("last=64", "last=20"), ("1100", "600"), ("k, 4, 4, protected", "k, 4, 2, protected"), ("choose, 128, 700", "choose, 128, 300")):
        assert a in text, a
        text = text.replace(a, b)
    exec(compile(text, S.__file__, "exec"), S.__dict__)
    import transformers, torch.distributed.tensor, torch._inductor.compile_fx
    torch.Generator = lambda device="cpu": G("cpu")
    for i, a in enumerate(sys.argv):
        if ":" in a:
            g, c = a.split(":"); sys.argv[i] = g
            S.GROUPS[g] = {n: x for n, x in S.GROUPS[g].items() if n in c.split("+")}
    from express_compile.kernels import launch as L, prepared
    true = L.launch
    def launch(kernel, grid, *args, **options):
        L._compiled.setdefault((kernel.fn,), None)
        true(kernel, grid, *args, **options)
    list(S.METHODS.values())
    import pkgutil, importlib
    S.kernels()
    for name, module in list(sys.modules.items()):
        if name.startswith("express_compile.") and getattr(module, "launch", None) is true and module is not L:
            module.launch = launch
    from express_compile.kernels import held, due
    S.hopper._is_hopper = lambda d: False
    S.TAKES = lambda *_: False
    prepared.ENABLED = False
    mock.patch.object(S.mock.patch, "object", S.mock.patch.object)
    cpu = S.on_cpu
    on = mock.patch.object(torch.Tensor, "is_cuda", True)
    @contextlib.contextmanager
    def off():
        on.stop(); yield; on.start()
    def on_cpu(f, *a):
        with off():
            return cpu(f, *a)
    S.on_cpu = on_cpu
    # references that are called on the device tensors themselves
    on.start()
    sys.exit(S.main())
