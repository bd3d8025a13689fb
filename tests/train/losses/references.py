"""Each loss as its formula reads: numpy, float64, loops, one sample at a time."""

import math

import numpy as np


def softmax(z, temperature=1.0):
    e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def soft_labels(z, v, temperature):
    rows = [kl(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(z, v, strict=True)]
    return temperature**2 * sum(rows) / len(rows)


def top_k_soft_labels(z, v, temperature, k):
    total = 0.0
    for a, b in zip(z, v, strict=True):
        best = np.argsort(-b)[:k]
        total += kl(softmax(b[best], temperature), softmax(a, temperature)[best])
    return temperature**2 * total / len(z)


def reverse_kl(z, v, temperature):
    return soft_labels(v, z, temperature)


def jensen_shannon(z, v, temperature, beta):
    total = 0.0
    for a, b in zip(z, v, strict=True):
        p, q = softmax(b, temperature), softmax(a, temperature)
        m = beta * p + (1 - beta) * q
        total += beta * kl(p, m) + (1 - beta) * kl(q, m)
    return temperature**2 * total / len(z)


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1]


def dist(z, v, temperature, beta, gamma):
    q = np.stack([softmax(row, temperature) for row in z])
    p = np.stack([softmax(row, temperature) for row in v])
    inter = np.mean([1 - pearson(q[i], p[i]) for i in range(len(q))])
    intra = np.mean([1 - pearson(q[:, j], p[:, j]) for j in range(q.shape[1])])
    return temperature**2 * (beta * inter + gamma * intra)


def ranking_pairwise(z, v, margin, top):
    rows = []
    for a, b in zip(z, v, strict=True):
        best = np.argsort(-b)[:top]
        pairs = [(i, j) for x, i in enumerate(best) for j in best[x + 1 :] if b[i] > b[j]]
        rows.append(np.mean([max(0.0, margin - (a[i] - a[j])) for i, j in pairs]))
    return np.mean(rows)


def ranking_listwise(z, v, top):
    rows = []
    for a, b in zip(z, v, strict=True):
        order = list(np.argsort(-b)[:top])
        chances = [math.exp(a[i]) / sum(math.exp(a[j]) for j in order[x:])
                   for x, i in enumerate(order)]  # fmt: skip
        rows.append(-np.mean(np.log(chances)))
    return np.mean(rows)


def token_losses(logits, tokens):
    """−log softmax of each next token, `[batch, seq − 1]`."""
    return np.array(
        [
            [-math.log(softmax(row[i])[t[i + 1]]) for i in range(len(t) - 1)]
            for row, t in zip(logits, np.maximum(tokens, 0), strict=True)
        ]
    )


def step_by_step(logits, tokens, segments, alpha):
    """Per sequence: α · mean over label tokens + (1 − α) · mean over rationale tokens."""
    total = 0.0
    for losses, kinds in zip(token_losses(logits, tokens), segments, strict=True):
        parts = {1: [], 2: []}
        for value, kind in zip(losses, kinds[1:], strict=True):
            if kind in parts:
                parts[kind].append(value)
        total += alpha * np.mean(parts[2]) + (1 - alpha) * np.mean(parts[1])
    return total / len(tokens)


def attention_map(a):
    """Σ_c a_c², flat and of length 1, of `[channels, height, width]`."""
    q = np.zeros(a.shape[1:])
    for channel in a:
        q += np.abs(channel) ** 2
    q = q.reshape(-1)
    return q / math.sqrt((q**2).sum())


def attention_transfer(s, t, form):
    each = []
    for a, b in zip(s, t, strict=True):
        d = attention_map(a) - attention_map(b)
        each.append(math.sqrt((d**2).sum()) if form == "paper" else (d**2).mean())
    return np.mean(each)


def attention_kl(s, t):
    rows = [
        kl(t[b, h, q], s[b, h, q])
        for b in range(s.shape[0])
        for h in range(s.shape[1])
        for q in range(s.shape[2])
    ]
    return np.mean(rows)


def value_relation(s, t, heads):
    """Both `[batch, seq, hidden]`, hidden split into so many heads."""
    rows = []
    for a, b in zip(s, t, strict=True):
        for h in range(heads):
            relations = []
            for x in (b, a):
                width = x.shape[1] // heads
                own = x[:, h * width : (h + 1) * width]
                scores = own @ own.T / math.sqrt(width)
                relations.append([softmax(row) for row in scores])
            rows += [kl(p, q) for p, q in zip(*relations, strict=True)]
    return np.mean(rows)


def flow(first, last):
    """The FSP matrix of `[m, h, w]` and `[n, h, w]`."""
    g = np.zeros((first.shape[0], last.shape[0]))
    for i in range(first.shape[0]):
        for j in range(last.shape[0]):
            for y in range(first.shape[1]):
                for x in range(first.shape[2]):
                    g[i, j] += first[i, y, x] * last[j, y, x]
    return g / (first.shape[1] * first.shape[2])


def fsp(s1, s2, t1, t2):
    each = [((flow(a, b) - flow(c, d)) ** 2).sum()
            for a, b, c, d in zip(s1, s2, t1, t2, strict=True)]  # fmt: skip
    return np.mean(each)


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance(s, t):
    n = len(s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    psi = []
    for x in (s, t):
        d = {p: math.dist(x[p[0]].ravel(), x[p[1]].ravel()) for p in pairs}
        mean = sum(d.values()) / len(d)
        psi.append({p: d[p] / mean for p in pairs})
    return np.mean([huber(psi[1][p] - psi[0][p]) for p in pairs])


def rkd_angle(s, t):
    n = len(s)
    found = []
    for i in range(n):
        for j in range(n):
            for k in range(n):
                if len({i, j, k}) < 3:
                    continue
                cosines = []
                for x in (s, t):
                    a, b = (x[i] - x[j]).ravel(), (x[k] - x[j]).ravel()
                    cosines.append(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))
                found.append(huber(cosines[1] - cosines[0]))
    return np.mean(found)


def similarity_preserving(s, t):
    b = len(s)
    grams = []
    for x in (s, t):
        g = np.array([[x[i].ravel() @ x[j].ravel() for j in range(b)] for i in range(b)])
        grams.append(np.array([row / math.sqrt((row**2).sum()) for row in g]))
    return ((grams[1] - grams[0]) ** 2).sum() / b**2


def cka(s, t):
    s, t = (x - x.mean(0) for x in (s, t))
    cross = (np.abs(t.T @ s) ** 2).sum()
    own = math.sqrt((np.abs(s.T @ s) ** 2).sum()) * math.sqrt((np.abs(t.T @ t) ** 2).sum())
    return 1 - cross / own


def crd(s, t, temperature, labels=None):
    """Of embeddings that have length 1; with labels, others of the same label do not count."""
    n, total = len(s), 0.0
    c = [[math.exp(s[i] @ t[j] / temperature) for j in range(n)] for i in range(n)]
    for i in range(n):
        others = [j for j in range(n) if labels is None or j == i or labels[i] != labels[j]]
        total -= 0.5 * math.log(c[i][i] / sum(c[i][j] for j in others))
        total -= 0.5 * math.log(c[i][i] / sum(c[j][i] for j in others))
    return total / n
