import threading, os, pytest
@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    import torch
    from torch._C._dynamo.guards import GlobalStateGuard
    g = GlobalStateGuard()
    res = []
    def f():
        with torch.no_grad() if not torch.is_grad_enabled() else torch.enable_grad():
            res.append((g.check(), g.reason() if not g.check() else ""))
    t = threading.Thread(target=f); t.start(); t.join()
    ths=[x.name for x in threading.enumerate()]
    if not res[0][0] or len(ths)>2:
        with open(f"/tmp/plug/out.{os.environ.get('PYTEST_XDIST_WORKER')}","a") as fh:
            fh.write(f"{item.nodeid} {res} {ths}\n")
