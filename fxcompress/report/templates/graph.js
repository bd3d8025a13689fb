"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const GROUP_OVER = 300, GROUP_SIZE = 60, OPEN_ALL_BELOW = 90, CHAR = 6.3, PAD = 14;
  const RANK = { removed: 0, added: 1, changed: 2, same: 3 };
  const data = JSON.parse(document.getElementById("graph-data").textContent);
  const canvas = document.getElementById("graph-canvas");
  const detail = document.getElementById("graph-detail");
  const treeBox = document.getElementById("graph-tree");

  /* The tree of modules. An item is a node (leaf) or a module (children). */
  const modules = new Map();
  const moduleAt = (path) => {
    let found = modules.get(path);
    if (found) return found;
    found = { path, children: [], open: path === "", parent: null, info: null, label: path };
    modules.set(path, found);
    if (path !== "") {
      const cut = path.lastIndexOf(".");
      found.parent = moduleAt(cut < 0 ? "" : path.slice(0, cut));
      found.parent.children.push(found);
    }
    return found;
  };
  moduleAt("");
  for (const info of data.modules) moduleAt(info.path);
  const leaves = data.nodes.map((node) => {
    const parent = moduleAt(node.scope);
    const leaf = { node, parent, edges: [] };
    parent.children.push(leaf);
    return leaf;
  });
  for (const info of data.modules) moduleAt(info.path).info = info;

  /* A module appears where its first node does, and crowded levels are split into groups. */
  const first = (item) => (item.node ? item.node.index : Math.min(Infinity, ...item.children.map(first)));
  data.nodes.forEach((node, index) => { node.index = index; });
  for (const module of [...modules.values()]) {
    module.children = module.children.filter((c) => c.node || first(c) < Infinity);
    module.children.sort((a, b) => first(a) - first(b));
    if (module.children.length <= GROUP_OVER) continue;
    const groups = [];
    for (let at = 0; at < module.children.length; at += GROUP_SIZE) {
      const children = module.children.slice(at, at + GROUP_SIZE);
      const path = `${module.path}#${groups.length + 1}`;
      const group = { path, children, open: false, parent: module, info: null,
        label: `${module.path || "graph"} · part ${groups.length + 1}` };
      for (const child of children) child.parent = group;
      modules.set(path, group);
      groups.push(group);
    }
    module.children = groups;
  }
  const count = (module, key) => module.children.reduce(
    (sum, c) => sum + (c.node ? Number(!key || c.node.status === key) : count(c, key)), 0);
  for (const module of modules.values()) {
    module.info = module.info || { nodes: count(module), added: count(module, "added"),
      changed: count(module, "changed"), removed: count(module, "removed") };
  }

  const ancestors = (item) => {
    const path = [];
    for (let at = item; at; at = at.parent) path.unshift(at);
    return path;
  };
  const touched = (module) => module.info.added + module.info.changed + module.info.removed > 0;

  const openAtStart = () => {
    if (data.nodes.length <= OPEN_ALL_BELOW) {
      for (const module of modules.values()) module.open = true;
      return;
    }
    let at = modules.get("");
    for (let depth = 0; depth < 3 && at; depth += 1) {
      at.open = true;
      const below = at.children.filter((c) => !c.node);
      at = below.find(touched) || below[0];
    }
  };

  /* One small dagre layout per open module; an open module is one box for its parent. */
  const textWidth = (text) => text.length * CHAR;
  const layout = (module) => {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 22, ranksep: 30, marginx: PAD, marginy: PAD });
    graph.setDefaultEdgeLabel(() => ({}));
    const keys = new Map();
    module.children.forEach((item, index) => {
      const key = String(index);
      keys.set(item, key);
      if (item.node) {
        const width = Math.max(96, textWidth(item.node.label), textWidth(item.node.type)) + 18;
        graph.setNode(key, { width, height: 38, item });
      } else if (item.open) {
        const inner = layout(item);
        graph.setNode(key, { width: Math.max(inner.width, textWidth(item.label) + 40), height: inner.height + 22, item, inner });
      } else {
        graph.setNode(key, { width: Math.max(120, textWidth(item.label) + 36), height: 40, item });
      }
    });
    const edges = new Map();
    for (const edge of module.crossing) {
      const from = keys.get(edge.from), to = keys.get(edge.to);
      if (from === undefined || to === undefined || from === to) continue;
      const key = `${from} ${to}`, known = edges.get(key);
      if (!known || RANK[edge.status] > RANK[known.status]) edges.set(key, { from, to, status: edge.status });
    }
    for (const { from, to, status } of edges.values()) graph.setEdge(from, to, { status });
    dagre.layout(graph);
    const { width, height } = graph.graph();
    return { graph, width: width || 120, height: height || 60 };
  };

  /* Each value is drawn at the level where its two ends part. */
  for (const module of modules.values()) module.crossing = [];
  for (const [source, target, status] of data.edges) {
    const a = ancestors(leaves[source]), b = ancestors(leaves[target]);
    let level = 0;
    while (level + 1 < a.length && level + 1 < b.length && a[level + 1] === b[level + 1]) level += 1;
    if (a[level + 1] && b[level + 1]) a[level].crossing.push({ from: a[level + 1], to: b[level + 1], status });
  }

  const make = (tag, attributes, parent, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  };
  const activate = (element, action) => {
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "button");
    element.addEventListener("click", (event) => { event.stopPropagation(); action(); });
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); action(); }
    });
  };
  const tally = (info) => [["+", info.added, "added"], ["~", info.changed, "changed"], ["−", info.removed, "removed"]]
    .filter(([, n]) => n > 0);

  const show = (node) => {
    detail.replaceChildren();
    const line = (mark, text, cls) => {
      const row = document.createElement("div");
      row.className = cls;
      row.textContent = `${mark} ${text}`;
      detail.appendChild(row);
    };
    if (node.before) line("−", node.before, "removed");
    if (node.text) line(node.status === "same" ? " " : "+", node.text, node.status === "same" ? "" : "added");
    if (!node.text && !node.before) line(" ", node.id, "");
  };

  const drawNode = (parent, item, x, y, width, height) => {
    const { node } = item;
    const group = make("g", { class: `node ${node.status} kind-${node.kind}`, transform: `translate(${x - width / 2} ${y - height / 2})`, "data-id": node.id }, parent);
    make("title", {}, group, [node.before && `before: ${node.before}`, node.text || node.id].filter(Boolean).join("\n"));
    make("rect", { width, height, rx: 4 }, group);
    make("text", { x: width / 2, y: 16, class: "name" }, group, node.label);
    make("text", { x: width / 2, y: 30, class: "type" }, group, node.type);
    activate(group, () => show(node));
  };
  const toggle = (module) => {
    module.open = !module.open;
    draw(module.path);
  };
  const drawModule = (parent, item, box) => {
    const { width, height, x, y } = box;
    const left = x - width / 2, top = y - height / 2;
    const changed = touched(item) ? "touched" : "";
    const group = make("g", { class: `module ${item.open ? "open" : "closed"} ${changed}`, transform: `translate(${left} ${top})`, "data-path": item.path }, parent);
    make("rect", { width, height, rx: 5 }, group);
    const head = make("g", { class: "head", "aria-expanded": String(item.open), "aria-label": `module ${item.label}` }, group);
    make("rect", { width, height: item.open ? 22 : height, class: "hit" }, head);
    const label = make("text", { x: 10, y: 16 }, head, `${item.open ? "−" : "+"} ${item.label}`);
    if (!item.open) {
      const line = make("text", { x: 10, y: 31, class: "counts" }, head);
      make("tspan", {}, line, `${item.info.nodes} nodes `);
      for (const [mark, n, cls] of tally(item.info)) make("tspan", { class: cls }, line, ` ${mark}${n}`);
    } else {
      label.setAttribute("class", "open-label");
      drawLevel(make("g", { transform: `translate(${(width - box.inner.width) / 2} 20)` }, group), box.inner);
    }
    activate(head, () => toggle(item));
  };
  const path = (points) => {
    const [start, ...rest] = points;
    let d = `M${start.x} ${start.y}`;
    for (let i = 0; i < rest.length - 1; i += 1) {
      const next = { x: (rest[i].x + rest[i + 1].x) / 2, y: (rest[i].y + rest[i + 1].y) / 2 };
      d += `Q${rest[i].x} ${rest[i].y} ${next.x} ${next.y}`;
    }
    const end = rest[rest.length - 1];
    return `${d}L${end.x} ${end.y}`;
  };
  const drawLevel = (parent, { graph }) => {
    for (const edge of graph.edges()) {
      const { points, status } = graph.edge(edge);
      make("path", { d: path(points), class: `edge ${status}`, "marker-end": `url(#arrow-${status === "removed" ? "removed" : "plain"})` }, parent);
    }
    for (const key of graph.nodes()) {
      const box = graph.node(key);
      if (box.item.node) drawNode(parent, box.item, box.x, box.y, box.width, box.height);
      else drawModule(parent, box.item, box);
    }
  };

  let scale = 1;
  let size = { width: 1, height: 1 };
  let picture = null;
  const zoom = (to) => {
    scale = Math.min(3, Math.max(0.1, to));
    picture.setAttribute("width", String(size.width * scale));
    picture.setAttribute("height", String(size.height * scale));
  };
  const draw = (keep) => {
    const result = layout(modules.get(""));
    size = { width: Math.ceil(result.width), height: Math.ceil(result.height) };
    const svg = make("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "group", "aria-label": "graph" });
    const defs = make("defs", {}, svg);
    for (const name of ["plain", "removed"]) {
      const marker = make("marker", { id: `arrow-${name}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, defs);
      make("path", { d: "M0 0L8 4L0 8Z", class: `tip ${name}` }, marker);
    }
    drawLevel(svg, result);
    canvas.replaceChildren(svg);
    picture = svg;
    zoom(scale);
    drawTree();
    if (keep !== undefined) {
      const target = canvas.querySelector(`[data-path="${CSS.escape(keep)}"]`);
      if (target) {
        target.scrollIntoView({ block: "center", inline: "center" });
        const head = target.querySelector(".head");
        if (head) head.focus({ preventScroll: true });
      }
    }
  };

  const drawTree = () => {
    const list = (module) => {
      const ul = document.createElement("ul");
      for (const child of module.children) {
        if (child.node) continue;
        const li = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-expanded", String(child.open));
        const name = document.createElement("span");
        name.textContent = child.path.startsWith(`${module.path}.`) ? child.label.slice(module.path.length + 1) : child.label;
        button.title = child.label;
        const nodes = document.createElement("small");
        nodes.textContent = ` ${child.info.nodes}`;
        button.append(name, nodes);
        for (const [mark, n, cls] of tally(child.info)) {
          const part = document.createElement("small");
          part.className = cls;
          part.textContent = ` ${mark}${n}`;
          button.append(part);
        }
        button.addEventListener("click", () => {
          const open = !child.open;
          if (open) for (const up of ancestors(child)) up.open = true;
          child.open = open;
          draw(child.path);
        });
        li.append(button);
        if (child.children.some((c) => !c.node)) li.append(list(child));
        ul.append(li);
      }
      return ul;
    };
    treeBox.replaceChildren(list(modules.get("")));
  };

  document.getElementById("zoom-in").addEventListener("click", () => zoom(scale * 1.25));
  document.getElementById("zoom-out").addEventListener("click", () => zoom(scale / 1.25));
  document.getElementById("zoom-fit").addEventListener("click", () => zoom(Math.min(1, canvas.clientWidth / size.width)));
  document.getElementById("fold-all").addEventListener("click", () => {
    for (const module of modules.values()) module.open = module.path === "";
    draw();
  });
  openAtStart();
  draw();
  canvas.scrollLeft = Math.max(0, (canvas.scrollWidth - canvas.clientWidth) / 2);
})();
