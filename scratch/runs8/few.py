"""plans.py with few policies ('' for all), and the plans per KV head of a file beside (KV=path)."""
import os, sys
sys.path.insert(0, "examples/bench")
import plans
from plans import SavedPlan
from pathlib import Path
if (names := sys.argv.pop(1)): plans.Bench.few = tuple(names.split(";"))
judged = plans.Bench.judged
def more(self, judge, n, budget, its):
    judged(self, judge, n, budget, {k: v for k, v in its.items() if k != "without records" or not os.environ.get("FILE")})
    if (path := os.environ.get("KV")) and "per head" in its and budget == max(self.args.rows):
        plan, suffix = SavedPlan.from_json(Path(path).read_text()), self.suffix
        self.suffix = ""
        self.write(judge.rows(plan), n, "per head", budget, plan); self.suffix = suffix
plans.Bench.judged = more
plans.main()
