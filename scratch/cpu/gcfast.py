import gc, pytest, os
@pytest.fixture(autouse=True)
def _fast():
    a=tuple(map(int,os.environ.get("GCT","30,2,2").split(",")))
    gc.set_threshold(*a)
    yield
    gc.set_threshold(700,10,10)
