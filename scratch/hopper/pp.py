import sys
p=sys.argv[1]; s=open(p).read()
def r(a,b,c=1):
    global s
    assert s.count(a)==c,(a,s.count(a)); s=s.replace(a,b)
r('v_full v_empty")\n','v_full v_empty turn")\n')
r('''        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
''','''        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
''')
r('''        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
''','''        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(2):
        mbarrier.init(shared.turn.index(i), count=1)
''')
# count runs from 1 in the loop: iteration i = count - 1
r('''        s_token = warpgroup_mma(q, k, b_zero''','''        mbarrier.wait(shared.turn.index(half), (count - 1) & 1 ^ (1 - half))
        s_token = warpgroup_mma(q, k, b_zero''')
r('''        b_s = warpgroup_mma_wait(1, deps=[s_token])
''','''        mbarrier.arrive(shared.turn.index(1 - half))
        b_s = warpgroup_mma_wait(1, deps=[s_token])
''')
open(p,"w").write(s)
