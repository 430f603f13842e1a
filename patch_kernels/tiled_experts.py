import torch
from torch import nn

from patch_kernels.ops import tile_linear
from patch_kernels.tiled_weight import TiledWeight


class TiledExperts(nn.Module):
    def __init__(
        self, experts, parts, in_features, out_features, bias, *, payload_bytes=None, dtype=torch.bfloat16, device=None
    ):
        super().__init__()
        self.experts, self.parts, self.in_features, self.out_features, self.weight_dtype = (
            experts,
            parts,
            in_features,
            out_features,
            dtype,
        )
        g = tile_linear.tile_grid((out_features, in_features))
        if payload_bytes is None:
            payload_bytes = experts * parts * g[0] * g[1] * 32768
        self.register_buffer("weight", torch.zeros(payload_bytes, dtype=torch.uint8, device=device))
        self.register_buffer("tile_is_sparse", torch.zeros(experts * parts, *g, dtype=torch.uint8, device=device))
        if bias:
            self.bias = nn.Parameter(
                torch.zeros(experts, parts * out_features, dtype=dtype, device=device), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)

    @classmethod
    def pack(cls, experts, parts, matrices, bias=None):
        ps, fs = [], []
        for w, k, f in matrices:
            t = TiledWeight.pack(w, k, f)
            ps.append(t.payload)
            fs.append(tile_linear.tile_flags(t.tile_is_sparse))
            shape, dt = w.shape, w.dtype
        m = cls(
            experts,
            parts,
            shape[1],
            shape[0],
            bias is not None,
            payload_bytes=sum(p.numel() for p in ps),
            dtype=dt,
            device="meta",
        )
        m.weight = torch.cat(ps)
        m.tile_is_sparse = torch.stack(fs).contiguous()
        if bias is not None:
            m.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return m

    @property
    def payload(self):
        return self.weight

    def tiled_weight(self, e, part):
        b = [tile_linear.payload_bytes(f) for f in self.tile_is_sparse]
        i = e * self.parts + part
        s = sum(b[:i])
        return TiledWeight(
            self.weight[s : s + b[i]],
            self.tile_is_sparse[i].bool(),
            (self.out_features, self.in_features),
            self.weight_dtype,
        )

    def refresh_schedule(self):
        pass

    def forward(self, x, experts):
        fan = len(experts) // max(1, len(x))
        y = x.new_empty(len(experts), self.parts * self.out_features)
        for e in range(self.experts):
            r = (experts == e).nonzero()[:, 0]
            if len(r):
                o = torch.cat([self.tiled_weight(e, q).matmul(x[r // fan]) for q in range(self.parts)], 1)
                y[r] = o if self.bias is None else o + self.bias[e]
        return y
