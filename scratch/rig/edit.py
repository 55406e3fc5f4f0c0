p='kernels/prepared.py'; s=open(p).read()
s=s.replace('''they run, and become straight code: memory, addresses, launches. In it temporary memory is one allocation, in which
what does not live at once shares its place, and nothing is checked, hashed or looked up again.
''','''they run, and become straight code: memory, addresses, launches. In it temporary memory is one allocation, in which
what does not live at once shares its place, and one more for what is gone before some tensor comes; and nothing is
checked, hashed or looked up again.
''')
s=s.replace('''        self.work = self._work(ends)
        own = self.needed - returned - set(given) - set(self.constants)
        for i, step in enumerate(self.steps):
            self.lines += [self._launch(step)] if isinstance(step, _Launch) else self._op(step)
            gone = [f"t{x}" for x, end in ends.items() if end == i and x in own]
''','''        self.work: dict[int, tuple[str, int]] = {}  # the name of an address, and how far behind it memory begins
        begun, ended = self._work(ends)
        own = self.needed - returned - set(given) - set(self.constants)
        for i, step in enumerate(self.steps):
            self.lines += begun.get(i, [])
            self.lines += [self._launch(step)] if isinstance(step, _Launch) else self._op(step)
            gone = [f"t{x}" for x, end in ends.items() if end == i and x in own] + ended.get(i, [])
''')
a=s.index('    def _work(self'); b=s.index('    def _op(self')
s=s[:a]+'''    def _work(self, ends: dict[int, int]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Places for memory that is there for its address alone; the lines that allocate it, by the steps that they
        stand before, and what is to be deleted, by the steps after which.

        What is gone before the next tensor comes is apart from the rest, so that there is room for that tensor.
        """
        made = {x: i for i, step in enumerate(self.steps) if isinstance(step, _Op) for x in step.fresh}
        own = [x for x in made if self.tensors[x].made == "empty" and x in self.pointed and x not in self.needed]
        others = [i for i, step in enumerate(self.steps) if isinstance(step, _Op) and self._allocates(step)]
        parts: dict[int, list[int]] = {}
        for x in own:
            before, after = (bisect.bisect(others, i) for i in (made[x], ends[x]))
            parts.setdefault(before if before == after else -1, []).append(x)
        begun: dict[int, list[str]] = {}
        ended: dict[int, list[str]] = {}
        for n, part in enumerate(parts.values()):
            begins, size = places([(self.tensors[x].bytes, made[x], ends[x]) for x in part])
            self.work.update((x, (f"w{n}", begin)) for x, begin in zip(part, begins, strict=True))
            line = f"work{n} = empty({self._name((size,))}, {self._name((1,))}, uint8)"
            begun.setdefault(min(made[x] for x in part), []).extend([line, f"w{n} = work{n}.data_ptr()"])
            ended.setdefault(max(ends[x] for x in part), []).append(f"work{n}")
        return begun, ended

    def _allocates(self, step: _Op) -> bool:
        return step.kind == "computed" or step.kind == "empty" and not self.needed.isdisjoint(step.fresh)

'''+s[b:]
s=s.replace('''            offset = self.work.get(root, 0) + tensor.offset
            return ("w" if root in self.work else f"p{root}") + (f" + {self._name(offset)}" if offset else "")
''','''            name, begin = self.work.get(root, (f"p{root}", 0))
            return name + (f" + {self._name(begin + tensor.offset)}" if begin + tensor.offset else "")
''')
s=s.replace("import contextlib\nimport copy","import bisect\nimport contextlib\nimport copy",1)
open(p,'w').write(s)
