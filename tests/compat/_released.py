"""Small modules of the shapes and habits that GRAND's released code and its descendants have.

Written for these tests. `torch_sparse` is whatever has that name when a class is used.
"""

import torch
from torch import nn
from torch_geometric.utils import softmax

F64 = torch.float64
N, D = 12, 6
OPT = {
    "heads": 2, "attention_dim": 8, "attention_type": "scaled_dot", "square_plus": False,
    "attention_norm_idx": 0, "reweight_attention": False, "max_nfe": 1000, "add_source": True,
    "method": "dopri5", "step_size": 1, "adjoint": False,
}  # fmt: skip


def edges(n=N, seed=0):
    """With loops, a repeated edge, and a node without."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, n - 1, (2, 4 * n), generator=generator)
    loops = torch.arange(n - 1).expand(2, -1)
    return torch.cat([drawn, drawn[:, :1], loops], 1)


def squareplus(scores, index, n):
    v = scores - scores.max()
    p = (v + torch.sqrt(v**2 + 4)) / 2
    return p / (p.new_zeros(n, p.shape[1]).index_add(0, index, p)[index] + 1e-16)


class SpGraphTransAttentionLayer(nn.Module):
    """Weights `[E, H]`, and beside them what `rest` says."""

    def __init__(self, in_features, opt, edge_weights=None, rest="pair"):
        super().__init__()
        self.opt, self.rest, self.edge_weights = opt, rest, edge_weights
        self.h = opt["heads"]
        self.d_k = opt["attention_dim"] // self.h
        for name in "QKV":
            setattr(self, name, nn.Linear(in_features, opt["attention_dim"]))
        if opt["attention_type"] == "exp_kernel":
            self.output_var, self.lengthscale = (nn.Parameter(torch.ones(1)) for _ in range(2))
        for p in self.parameters():  # scores that differ
            nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 else nn.init.normal_(p, std=0.7)

    def heads(self, module, x):
        return module(x).view(-1, self.h, self.d_k).transpose(1, 2)

    def forward(self, x, edge):
        q, k, v = (self.heads(m, x) for m in (self.Q, self.K, self.V))
        q_e, k_e = q[edge[0]], k[edge[1]]
        kind = self.opt["attention_type"]
        if kind == "exp_kernel":
            apart = torch.sum((q_e - k_e) ** 2, dim=1)
            scores = self.output_var**2 * torch.exp(-apart / (2 * self.lengthscale**2))
        elif kind == "scaled_dot":
            scores = torch.sum(q_e * k_e, dim=1) / self.d_k**0.5
        else:
            if kind == "pearson":
                q_e, k_e = (t - t.mean(1, keepdim=True) for t in (q_e, k_e))
            scores = nn.functional.cosine_similarity(q_e, k_e, dim=1, eps=1e-5)
        if self.opt["reweight_attention"]:
            scores = scores * self.edge_weights.unsqueeze(1)
        index = edge[self.opt["attention_norm_idx"]]
        if self.opt["square_plus"]:
            attention = squareplus(scores, index, len(x))
        else:
            attention = softmax(scores, index, num_nodes=len(x))
        return {"pair": (attention, (v, scores)), "v": (attention, v), "none": attention}[self.rest]


class MaxNFEError(Exception):
    pass


class Field(nn.Module):
    """GRAND's: `alpha (A x − x) + beta x0`, nonlinear unless it is given weights."""

    def __init__(self, opt, edge_index, d=D):
        super().__init__()
        self.opt, self.edge_index, self.nfe, self.x0 = opt, edge_index, 0, None
        self.multihead_att_layer = SpGraphTransAttentionLayer(d, opt)
        self.alpha_train, self.beta_train = (nn.Parameter(torch.tensor(v)) for v in (0.3, 0.2))
        self.attention_weights = None

    def count(self):
        if self.nfe > self.opt["max_nfe"]:
            raise MaxNFEError
        self.nfe += 1

    def product(self, x):
        import torch_sparse

        attention = self.attention_weights
        if attention is None:
            attention, _ = self.multihead_att_layer(x, self.edge_index)
        return torch_sparse.spmm(self.edge_index, attention.mean(dim=1), len(x), len(x), x)

    def forward(self, t, x):
        self.count()
        f = torch.sigmoid(self.alpha_train) * (self.product(x) - x)
        return f + self.beta_train * self.x0 if self.opt["add_source"] else f


class Block(nn.Module):
    """An integrator that is bound when it is built, and the options that every block passes."""

    def __init__(self, field, opt, linear=False):
        super().__init__()
        if opt["adjoint"]:
            from torchdiffeq import odeint_adjoint as odeint
        else:
            from torchdiffeq import odeint
        self.odefunc, self.opt, self.linear = field, opt, linear
        self.train_integrator = self.test_integrator = odeint
        if linear:
            self.multihead_att_layer = SpGraphTransAttentionLayer(D, opt)

    def forward(self, x):
        field = self.odefunc
        field.x0 = x.clone().detach()
        if self.linear:
            field.attention_weights, _ = self.multihead_att_layer(x, field.edge_index)
        integrator = self.train_integrator if self.training else self.test_integrator
        more = {"adjoint_method": "dopri5", "adjoint_options": {"step_size": 1},
                "adjoint_rtol": 1e-4, "adjoint_atol": 1e-4}  # fmt: skip
        times = torch.tensor([0.0, 2.0], dtype=x.dtype)
        return integrator(
            field, x, times, method=self.opt["method"], rtol=1e-4, atol=1e-4,
            options={"step_size": self.opt["step_size"]}, **(more if self.opt["adjoint"] else {}),
        )[1]  # fmt: skip


class Gread(Field):
    """A reaction, and another name for the source."""

    def __init__(self, opt, edge_index):
        super().__init__(opt, edge_index)
        self.source_train = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, x):
        self.count()
        diffusion = self.product(x) - x
        f = torch.sigmoid(self.alpha_train) * diffusion - self.beta_train * self.product(diffusion)
        return f + self.source_train * self.x0


class GraphCon(Field):
    """The state is a pair side by side; the attention sees its second half."""

    def __init__(self, opt, edge_index):
        super().__init__(opt, edge_index, d=D // 2)

    def forward(self, t, x_full):
        self.count()
        x, y = x_full[:, : D // 2], x_full[:, D // 2 :]
        return torch.cat([torch.sigmoid(self.product(y)) - y - x, self.alpha_train * x], dim=1)


class Frond(Field):
    """A fraction of the attention is left out of the product."""

    def product(self, x):
        import torch_sparse

        attention, _ = self.multihead_att_layer(x, self.edge_index)
        fraction = 0.3 * attention.mean(dim=1)
        return torch_sparse.spmm(self.edge_index, fraction, len(x), len(x), x)


class Acmp(Field):
    """Weights that repel below a threshold, and a double well."""

    def product(self, x):
        import torch_sparse

        weights = self.attention_weights.mean(dim=1) - 0.2
        return torch_sparse.spmm(self.edge_index, weights, len(x), len(x), x)

    def forward(self, t, x):
        self.count()
        return self.product(x) - x - 0.1 * (x**2 - 1) * x


class PerHead(Field):
    """A product for each head, with features of its own."""

    def product(self, x):
        import torch_sparse

        attention, (v, _) = self.multihead_att_layer(x, self.edge_index)
        heads = [torch_sparse.spmm(self.edge_index, attention[:, h], len(x), len(x), x)
                 for h in range(self.opt["heads"])]  # fmt: skip
        mixed = torch_sparse.spmm(self.edge_index, attention[:, 0], len(x), len(x), v[:, :, 0])
        return torch.stack(heads).mean(0) + mixed.mean(1, keepdim=True)


def gradients(model, x):
    """What a model makes of `x`, and the gradients of a sum of it by `x` and its parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    direction = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    tensors = [x, *model.parameters()]
    grads = torch.autograd.grad((y * direction).sum(), tensors, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)),
    ]
