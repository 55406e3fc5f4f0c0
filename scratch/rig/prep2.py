import sys; sys.argv=[sys.argv[0],'x']
exec(open('/tmp/sus/prep.py').read().split('if __name__')[0])
from unittest import mock
with mock.patch.object(torch.Tensor,'new_empty',torch.Tensor.new_zeros), mock.patch.object(torch,'empty',torch.zeros), mock.patch.object(torch,'empty_like',torch.zeros_like):
    PP._empty_strided=lambda i,s,st,dt: torch.empty_strided(s,st,dtype=dt).zero_()
    for case in ("express, protected","heads","heads, last"): go('grad',m.test_code_of_gradients_gives_their_bits,case)
print(fails)
