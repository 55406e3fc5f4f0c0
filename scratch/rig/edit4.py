p='kernels/prepared.py'; s=open(p).read()
a=s.index('they run, and become straight code'); b=s.index('Two recordings have to')
s=s[:a]+'''they run, and become straight code: memory, addresses, launches. In it temporary memory that is gone before the same
tensor comes is one allocation, in which what does not live at once shares its place, and nothing is checked, hashed or
looked up again.

'''+s[b:]
a=s.index('Only where the environment'); b=s.index('"""',a)
s=s[:a]+'''Only where the environment says ``EXPRESS_PREPARED=1``: in the first run on a GPU three of 163 tests failed. Rehearsed
without one, three do: two that counted calls of another op inside of a body, and one of memory, of which code took 14%
more than the body then. A run has yet to confirm it.
'''+s[b:]
s=s.replace('''        What is gone before the next tensor comes is apart from the rest, so that there is room for that tensor.
''','''        What is gone before the same tensor comes is one allocation: then there is room for that tensor.
''')
open(p,'w').write(s)
