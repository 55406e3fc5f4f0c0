import os
os.environ["TRITON_INTERPRET"]="1"
def pytest_collection_modifyitems(items):
    import sys
    for i in items:
        i.module.PROGRAMS = int(os.environ["PROGRAMS"])
