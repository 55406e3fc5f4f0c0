"""Milliseconds of every call with one Triton and with the other, of the last run of each in a CSV file."""
import csv
import sys

rows, tritons = {}, []
for row in csv.DictReader(open(sys.argv[1], newline="")):
    params = dict(x.split("=") for x in row["params"].split())
    key = row["job"], row["method"], params.get("plan", row["s"]), params.get("kernel", "") or row["dtype"][:7].replace("bfloat1", "")
    rows.setdefault(key, {})[row["triton"]] = row
    tritons += [row["triton"]] if row["triton"] not in tritons else []
print(f"{'job':20}{'method':12}{'s/plan':8}{'kernel':7}" + "".join(f"{'ms ' + t:>11}{'p20-p80':>17}" for t in tritons)
      + f"{'ratio':>7}  best exact ms, errors")
for key, of in rows.items():
    line = f"{key[0]:20}{key[1]:12}{key[2]:8}{key[3]:7}"
    for t in tritons:
        row = of.get(t)
        line += f"{float(row['ms_p50']):11.4f}  {float(row['ms_p20']):6.3f}-{float(row['ms_p80']):<7.3f}" if row else f"{'-':>28}"
    have = [of[t] for t in tritons if t in of]
    ratio = f"{float(have[-1]['ms_p50']) / float(have[0]['ms_p50']):7.3f}" if len(have) == 2 else "      -"
    told = " ".join(f"{float(x['opponent_ms_p50']):.3f}" for x in have)
    errors = " ".join(f"{float(x['error']):.1e}" + ("!FAILED" if x["speedup"].startswith("failed") else "") for x in have)
    print(f"{line}{ratio}  {told}  {errors}")
