"""examples/bench/limits.py without a GPU: every call in Triton's interpreter at tiny sizes."""
src = open(".gpu/sanitize/dry.py").read()
head, tail = src.split("with OnCPU():\n")
exec(compile(head.replace('sys.path.insert(0, "tests/gpu")', 'sys.path.insert(0, "examples/bench")'), "dry", "exec"))
import time, types
with OnCPU():
    import transformers, torch.distributed.tensor, torch._inductor.compile_fx
    torch.Generator = lambda device="cpu": G("cpu")
    torch.bfloat16 = torch.float16
    L = types.ModuleType("limits"); L.__file__ = os.path.abspath("examples/bench/limits.py"); sys.modules["limits"] = L
    text = open(L.__file__).read()
    for a, b in (("H, H_KV, D, N, LONG = 32, 8, 128, 32768, 131072", "H, H_KV, D, N, LONG = 8, 4, 64, 700, 900"), ("E.Express(512, inflation=E.default_inflation(512)", "E.Express(16, inflation=E.default_inflation(16)"),
                 ("256 if protected else 32", "64 if protected else 32"), ("contests, 256", "contests, 256"), ("(N - 32) // CONTEST, 256)", "(N - 32) // CONTEST, 16)"), ("BlockConfig(16)", "BlockConfig(2, recent=64)"),
                 ("Rows(32, 256, 1024)", "Rows(32, 64, 16)"), ("Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 512, 256), Rows(32, 256, 512)", "Rows(32, 64, selected=2), Rows(everything=True), Rows(32, 64, 16, 16), Rows(32, 64, 16)"), ("partial(attention, 256)", "partial(attention, 16)")):
        assert a in text, a
        text = text.replace(a, b)
    exec(compile(text, L.__file__, "exec"), L.__dict__)
    from express_compile.kernels import launch as LL
    L.hopper._is_hopper = lambda d: False
    L.hopper.takes = lambda *_: False
    seen = []
    true = LL.launch
    def launch(kernel, grid, *args, **options):
        seen.append(kernel.fn.__name__); true(kernel, grid, *args, **options)
    list(L.METHODS.values())
    for name, module in list(sys.modules.items()):
        if name.startswith("express_compile.") and getattr(module, "launch", None) is true and module is not LL:
            module.launch = launch
    mock.patch.object(torch.cuda, "empty_cache", lambda: None).start()
    mock.patch.object(torch.cuda.profiler, "start", lambda: None).start()
    mock.patch.object(torch.cuda.profiler, "stop", lambda: None).start()
    mock.patch.object(torch.Tensor, "is_cuda", True).start()
    for name in sys.argv[1:] or L.CALLS:
        t = time.time(); seen.clear()
        try:
            L.launch([name]); print(name, "ok", dict.fromkeys(seen).keys(), f"{time.time() - t:.0f} s", flush=True)
        except Exception as e:
            import traceback; traceback.print_exc(); print(name, "FAILED", repr(e)[:300], flush=True)
