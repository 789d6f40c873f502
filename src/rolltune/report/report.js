// The script of a report. Everything it shows comes from the page's JSON. Texts of models are untrusted: they enter the
// document as text nodes only, with control characters made visible.
"use strict";
(() => {
  const watching = document.body.dataset.watch === "yes";
  const main = document.getElementById("main");
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2], [12, 4], [4, 4, 1, 4]];
  const STEPS = [1, 2, 5].flatMap((n) => [...Array(9).keys()].map((power) => n * 10 ** power)).sort((a, b) => a - b);
  const PAGE = 8; // groups shown at once
  const MAX_FOUND = 200; // groups that a search collects
  const MAX_TEXT = 20000; // characters of a text shown at first
  let data = JSON.parse(document.getElementById("data").textContent);

  // --- elements

  function el(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  // Control, invisible and direction characters, and halves of surrogate pairs, as \x1b or \u202e.
  function visible(text) {
    return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu, (char) => {
      if (char === "\n" || char === "\t") return char;
      const code = char.codePointAt(0);
      return code < 256 ? "\\x" + code.toString(16).padStart(2, "0") : "\\u" + code.toString(16).padStart(4, "0");
    });
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value)) return String(value);
    if (Math.abs(value) >= 1000) return value.toFixed(0);
    if (Math.abs(value) < 1e-3) return value.toExponential(digits - 1).replace(/\.?0*e/, "e");
    return String(Number(value.toPrecision(digits)));
  }

  function section(id, title, ...children) {
    return el("section", { id, "aria-labelledby": id + "-title" }, el("h2", { id: id + "-title" }, title), ...children);
  }

  function table(columns, rows, caption = "") {
    const head = el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, visible(name))));
    const body = rows.map((row) =>
      el("tr", {}, ...row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, visible(cell)))),
    );
    const made = el("table", {}, columns.some(Boolean) ? el("thead", {}, head) : "", el("tbody", {}, ...body));
    if (caption) made.prepend(el("caption", {}, visible(caption)));
    return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": caption || "table" }, made);
  }

  // --- charts

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (i) => style("--c" + (i % 8));
  const charts = new Map(); // by title
  let smoothing = 5; // percent of the points that a window holds

  // The mean of a window centred on each value, so that the curve does not lag behind.
  function smooth(values) {
    const known = values.map((value, i) => [value, i]).filter(([value]) => value !== null);
    const half = Math.floor((known.length * smoothing) / 200);
    const out = values.map(() => null);
    known.forEach(([, i], at) => {
      const window = known.slice(Math.max(0, at - half), at + half + 1);
      out[i] = window.reduce((sum, [value]) => sum + value, 0) / window.length;
    });
    return out;
  }

  // uPlot's series and data of a panel. A line may have two series (as measured and smoothed) and two ends of intervals.
  function layout(panel, hidden) {
    const series = [{}];
    const columns = [panel.x];
    const bands = [];
    const add = (options, column) => {
      columns.push(column);
      return series.push({ spanGaps: true, points: { show: false }, ...options }) - 1;
    };
    if (panel.stacked) {
      let below = panel.x.map(() => 0);
      let last = 0;
      panel.lines.forEach((line, i) => {
        if (hidden.has(line.label)) return;
        below = below.map((sum, at) => sum + (line.y[at] ?? 0));
        const index = add({ stroke: color(i), width: 1, fill: last ? undefined : color(i) + "66" }, below);
        if (last) bands.push({ series: [index, last], fill: color(i) + "66" });
        last = index;
      });
      return { series, columns, bands };
    }
    panel.lines.forEach((line, i) => {
      if (hidden.has(line.label)) return;
      const few = line.y.filter((value) => value !== null).length < 3;
      const shown = { stroke: color(i), width: 2, dash: DASHES[i % 8] };
      if (line.low) {
        const high = add({ width: 0 }, line.high);
        const low = add({ width: 0 }, line.low);
        bands.push({ series: [high, low], fill: color(i) + "2e" });
      }
      if (line.points || few || !smoothing) {
        add({ ...shown, points: { show: line.points || few, size: 7, fill: color(i), stroke: color(i) } }, line.y);
      } else {
        add({ stroke: color(i) + "50", width: 1 }, line.y);
        add(shown, smooth(line.y));
      }
    });
    return { series, columns, bands };
  }

  class Chart {
    constructor(panel) {
      this.panel = panel;
      this.hidden = new Set();
      this.plot = el("div", {
        class: "plot",
        tabIndex: 0,
        role: "group",
        "aria-label": panel.title + ": arrow keys read the values, plus and minus zoom, 0 shows everything",
        onkeydown: (event) => this.key(event),
      });
      this.legend = el("ul", { class: "legend", "aria-live": "polite" });
      this.values = el("details", { class: "values", ontoggle: () => this.fillTable() }, el("summary", {}, "Table"));
      this.root = el(
        "figure",
        {},
        el("figcaption", {}, el("strong", {}, visible(panel.title)), " ", el("span", {}, visible(panel.unit))),
        this.plot,
        this.legend,
        this.values,
      );
      this.observer = new ResizeObserver(() => this.resize());
      this.observer.observe(this.plot);
    }

    draw() {
      const kept = this.isZoomed() ? { min: this.uplot.scales.x.min, max: this.uplot.scales.x.max } : null;
      this.uplot?.destroy();
      const { series, columns, bands } = layout(this.panel, this.hidden);
      const font = "12px system-ui, sans-serif";
      const axis = { stroke: style("--muted"), font, labelFont: font, grid: { stroke: style("--grid"), width: 1 }, ticks: { show: false } };
      const labels = (_, splits) => splits.map((value) => (value === null ? "" : number(value)));
      const { x_label } = this.panel;
      const isByStep = x_label === "step";
      const options = {
        width: Math.max(200, this.plot.clientWidth),
        height: 210,
        padding: [8, 12, 0, 0],
        legend: { show: false },
        series,
        bands,
        scales: {
          x: this.panel.log2 ? { time: false, distr: 3, log: 2 } : { time: false },
          y: { range: (_, min, max) => this.range(min, max) },
        },
        axes: [
          { ...axis, size: 30, values: labels, ...(isByStep ? { incrs: STEPS } : { label: x_label, labelSize: 18 }) },
          { ...axis, size: 52, values: labels },
        ],
        cursor: { sync: { key: x_label }, drag: { x: true, y: false }, points: { size: 6 } },
        hooks: { setCursor: [() => this.fillLegend()] },
      };
      this.uplot = new uPlot(options, columns, this.plot);
      if (kept) this.uplot.setScale("x", kept);
      this.fillLegend();
      if (this.values.open) this.fillTable();
    }

    // From 0 for sums, and 0 to 1 where everything is 0.
    range(min, max) {
      if (min === null || (min === 0 && max === 0)) return [0, 1];
      return uPlot.rangeNum(this.panel.stacked ? 0 : min, max, 0.1, true);
    }

    update(panel) {
      this.panel = panel;
      this.draw();
    }

    isZoomed() {
      const x = this.uplot?.data[0] ?? [];
      const scale = this.uplot?.scales.x;
      return x.length > 1 && (scale.min > x[0] || scale.max < x[x.length - 1]);
    }

    resize() {
      const width = this.plot.clientWidth;
      if (this.uplot && width && width !== this.uplot.width) this.uplot.setSize({ width, height: 210 });
    }

    // The values under the cursor; without a cursor the last ones.
    fillLegend() {
      const at = this.uplot?.cursor.idx ?? null;
      const entries = this.panel.lines.map((line, i) => {
        const last = line.y.findLastIndex((value) => value !== null);
        const index = at === null || (at >= line.y.length) ? last : at;
        const value = line.y[index] ?? null;
        const interval = line.low && value !== null ? ` [${number(line.low[index])}, ${number(line.high[index])}]` : "";
        const off = this.hidden.has(line.label);
        const button = el("button", { type: "button", "aria-pressed": String(!off), onclick: () => this.toggle(line) });
        button.append(el("span", { class: `swatch c${i % 8}` }), visible(line.label));
        return el("li", { class: off ? "off" : "" }, button, " ", el("output", {}, number(value) + interval));
      });
      const x = at === null ? "" : `${this.panel.x_label} ${number(this.panel.x[at])}`;
      const focused = [...this.legend.querySelectorAll("button")].indexOf(document.activeElement);
      this.legend.replaceChildren(el("li", { class: "at" }, x || "latest"), ...entries);
      if (focused >= 0) this.legend.querySelectorAll("button")[focused]?.focus();
    }

    toggle(line) {
      if (!this.hidden.delete(line.label)) this.hidden.add(line.label);
      this.draw();
    }

    fillTable() {
      if (!this.values.open) return;
      const { x, lines, x_label } = this.panel;
      const every = Math.max(1, Math.ceil(x.length / 200));
      const rows = x.map((value, i) => [number(value), ...lines.map((line) => number(line.y[i], 5))]);
      const shown = rows.filter((_, i) => i % every === 0 || i === rows.length - 1);
      const made = table([x_label, ...lines.map((line) => line.label)], shown, this.panel.title);
      this.values.replaceChildren(this.values.firstChild, made);
    }

    key(event) {
      const { uplot: plot, panel } = this;
      const { min, max } = plot.scales.x;
      const zoom = (factor) => {
        const middle = plot.cursor.idx === null ? (min + max) / 2 : panel.x[plot.cursor.idx];
        plot.setScale("x", { min: middle - (middle - min) * factor, max: middle + (max - middle) * factor });
      };
      const move = (by) => {
        const from = plot.cursor.idx ?? (by > 0 ? -1 : panel.x.length);
        const to = Math.min(panel.x.length - 1, Math.max(0, from + by));
        plot.setCursor({ left: plot.valToPos(panel.x[to], "x"), top: 10 });
      };
      const actions = {
        ArrowLeft: () => move(-1),
        ArrowRight: () => move(1),
        "+": () => zoom(0.5),
        "=": () => zoom(0.5),
        "-": () => zoom(2),
        0: () => plot.setScale("x", { min: panel.x[0], max: panel.x[panel.x.length - 1] }),
      };
      if (actions[event.key]) {
        event.preventDefault();
        actions[event.key]();
      }
    }
  }

  const redraw = () => charts.forEach((chart) => chart.draw());

  function showCharts() {
    const box = document.getElementById("charts");
    if (!box) return;
    for (const panel of data.panels) {
      const known = charts.get(panel.title);
      if (known) {
        known.update(panel);
        continue;
      }
      const chart = new Chart(panel);
      charts.set(panel.title, chart);
      box.append(chart.root);
      chart.draw();
    }
  }

  function chartsSection() {
    const slider = el("input", { type: "range", min: 0, max: 30, value: smoothing, id: "smoothing" });
    slider.addEventListener("input", () => {
      smoothing = Number(slider.value);
      redraw();
    });
    return section(
      "curves",
      "Curves",
      el(
        "p",
        { class: "tools" },
        ...(data.kind === "evaluation" ? [] : [el("label", { for: "smoothing" }, "Smoothing"), slider]),
        el("span", { class: "hint" }, "Drag over a chart to zoom, double-click to zoom out. Click a name to hide a curve."),
      ),
      el("div", { id: "charts" }),
    );
  }

  // --- samples

  const FILTERS = {
    place: { step: "all of this step", model: "all of this model" },
    best: "best first",
    worst: "worst first",
    changed: { step: "most changed: a problem's first and last time", model: "models differ most" },
    unscored: "with unscored completions",
    truncated: "with truncated completions",
    flat: "all rewards equal",
    single: { model: "solved by one model only" },
  };
  const state = { filter: "place", place: null, query: "", from: 0, colour: "none", groups: [], search: 0 };
  const unpacked = new Map(); // pack: its groups, the last few

  async function unpack(key) {
    if (!unpacked.has(key)) {
      let bytes;
      if (watching) {
        bytes = await (await fetch("pack/" + encodeURIComponent(key))).arrayBuffer();
      } else {
        const text = atob(document.getElementById("pack-" + key).textContent);
        bytes = Uint8Array.from(text, (char) => char.charCodeAt(0));
      }
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(key, await new Response(stream).json());
      if (unpacked.size > 30) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(key);
  }

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const known = (values) => values.filter((value) => value !== null);

  // The groups that a filter leaves, in its order; a group is its number in the index.
  function filtered() {
    const { groups, places } = data.samples;
    const all = groups.pack.map((_, i) => i);
    const scored = all.filter((i) => known(groups.rewards[i]).length);
    const best = (i) => Math.max(...known(groups.rewards[i]));
    const worst = (i) => Math.min(...known(groups.rewards[i]));
    const average = (i) => mean(known(groups.rewards[i]));
    const byProblem = (list) => {
      const found = new Map();
      list.forEach((i) => found.set(groups.problem[i], [...(found.get(groups.problem[i]) ?? []), i]));
      return [...found.values()];
    };
    switch (state.filter) {
      case "best":
        return scored.sort((a, b) => best(b) - best(a) || average(b) - average(a) || b - a);
      case "worst":
        return scored.sort((a, b) => worst(a) - worst(b) || average(a) - average(b) || b - a);
      case "changed": {
        const change = (list) => Math.abs(average(list[list.length - 1]) - average(list[0]));
        const sets = byProblem(scored).filter((list) => list.length > 1 && change(list) > 0);
        sets.sort((a, b) => change(b) - change(a));
        return sets.flatMap((list) => (data.samples.axis === "model" ? list : [list[0], list[list.length - 1]]));
      }
      case "single": {
        const solvers = (list) => list.filter((i) => best(i) === 1).length;
        return byProblem(scored).filter((list) => list.length > 1 && solvers(list) === 1).flat();
      }
      case "unscored":
        return all.filter((i) => groups.rewards[i].includes(null));
      case "truncated":
        return all.filter((i) => groups.cut[i] > 0);
      case "flat":
        return scored.filter((i) => best(i) === worst(i) && groups.rewards[i].length > 1);
      default:
        return all.filter((i) => groups.place[i] === (state.place ?? places[places.length - 1]));
    }
  }

  const texts = (group) => [
    group.problem,
    group.answer ?? "",
    ...group.messages.map((message) => message.content),
    ...group.completions.flatMap((c) => [c.text ?? "", c.failure ?? "", ...Object.values(c.notes ?? {})]),
  ];

  // Choose the groups to show. A search reads every step, and shows what it has found so far.
  async function choose() {
    const search = ++state.search;
    state.from = 0;
    const query = state.query.toLowerCase();
    if (query && state.filter === "place") state.filter = "best"; // a search is over all steps
    document.getElementById("filter").value = state.filter;
    const candidates = filtered();
    if (!query) {
      state.groups = candidates;
      return showGroups();
    }
    state.groups = [];
    const { groups } = data.samples;
    const packs = new Map();
    candidates.forEach((i) => packs.set(groups.pack[i], [...(packs.get(groups.pack[i]) ?? []), i]));
    let done = 0;
    let told = performance.now();
    for (const [pack, members] of packs) {
      const content = await unpack(pack);
      if (search !== state.search) return;
      const hits = members.filter((i) => texts(content[groups.at[i]]).some((text) => text.toLowerCase().includes(query)));
      state.groups.push(...hits);
      done += 1;
      if (state.groups.length >= MAX_FOUND) break;
      if (performance.now() - told > 300) {
        told = performance.now();
        await showGroups(`searching: ${done} of ${packs.size}, `);
      }
    }
    const rank = new Map(candidates.map((i, at) => [i, at]));
    state.groups.sort((a, b) => rank.get(a) - rank.get(b));
    await showGroups(state.groups.length >= MAX_FOUND ? "the first " : "");
  }

  async function showGroups(prefix = "") {
    const list = document.getElementById("groups");
    const { groups } = data.samples;
    const shown = state.groups.slice(state.from, state.from + PAGE);
    const search = state.search;
    const cards = await Promise.all(shown.map(async (i) => card(i, (await unpack(groups.pack[i]))[groups.at[i]])));
    if (search !== state.search) return;
    const total = state.groups.length;
    const range = total > PAGE ? `${state.from + 1} to ${Math.min(total, state.from + PAGE)} of ` : "";
    document.getElementById("count").textContent = `${prefix}${range}${total} ${total === 1 ? "prompt" : "prompts"}`;
    document.getElementById("previous").disabled = state.from === 0;
    document.getElementById("next").disabled = state.from + PAGE >= total;
    list.replaceChildren(...cards);
  }

  function card(index, group) {
    const { groups, axis } = data.samples;
    const rewards = known(group.completions.map((c) => c.reward ?? null));
    const summary = rewards.length ? `mean reward ${number(mean(rewards))}` : "unscored";
    const messages = group.messages.map((message) =>
      el("div", { class: "message" }, el("span", { class: "role" }, visible(message.role)), long(message.content)),
    );
    return el(
      "article",
      { class: "group" },
      el("h3", {}, `${axis} ${visible(groups.place[index])} · ${visible(group.problem)} `, el("small", {}, summary)),
      ...messages,
      group.answer ? el("p", { class: "answer" }, "Gold answer: ", marked(group.answer)) : null,
      el("div", { class: "completions" }, ...group.completions.map((c, i) => completion(c, i, rewards))),
    );
  }

  function completion(c, i, rewards) {
    const reward = c.reward ?? null;
    const spread = rewards.length > 1 && Math.max(...rewards) > Math.min(...rewards);
    const isTop = spread && reward === Math.max(...rewards);
    const isBottom = spread && reward === Math.min(...rewards);
    const flags = [
      c.finish_reason === "length" ? "truncated" : null,
      reward === null ? "unscored" : null,
      c.failure ?? null,
      data.samples.axis === "step" && !c.advantage ? "no gradient" : null,
    ].filter(Boolean);
    const parts = Object.entries(c.parts ?? {}).filter(([name]) => !/\/(failure|criterion)\//.test(name));
    const notes = Object.entries(c.notes ?? {});
    const sign = c.advantage > 0 ? "+" : "";
    return el(
      "div",
      { class: `completion${isTop ? " top" : isBottom ? " bottom" : ""}` },
      el(
        "p",
        { class: "head" },
        el("strong", {}, visible(c.label ?? `#${i + 1}`)),
        el("span", {}, `reward ${number(reward)}`),
        c.advantage === undefined ? null : el("span", {}, `advantage ${sign}${number(c.advantage)}`),
        el("span", {}, `${c.tokens ?? 0} tokens`),
        ...flags.map((flag) => el("span", { class: "flag" }, visible(flag))),
      ),
      body(c),
      parts.length ? el("p", { class: "parts" }, ...parts.map(([name, value]) => el("span", {}, `${visible(name)} ${number(value)}`))) : null,
      notes.length
        ? el(
            "details",
            { class: "notes" },
            el("summary", {}, `Verdicts (${notes.length})`),
            el("dl", {}, ...notes.flatMap(([name, text]) => [el("dt", {}, visible(name)), el("dd", {}, long(text.replaceAll(" | ", "\n")))])),
          )
        : null,
    );
  }

  // How tokens are coloured, in five levels.
  const SCALES = {
    logprob: {
      values: "token_logprobs",
      level: (logprob) => [-0.1, -0.7, -1.6, -3].filter((edge) => logprob < edge).length,
      title: (logprob) => `log-prob ${number(logprob)}, probability ${number(Math.exp(logprob))}`,
      key: "Probability of the token: ",
      labels: ["≥ 0.9", "≥ 0.5", "≥ 0.2", "≥ 0.05", "less"],
      hint: " Only the first completions of a step have tokens.",
    },
    gap: {
      values: "token_gaps",
      level: (gap) => [0.001, 0.01, 0.1, 0.5].filter((edge) => Math.abs(gap) > edge).length,
      title: (gap) => `log-prob of the trainer minus that of the sampler: ${number(gap)}`,
      key: "Difference of the log-probs: ",
      labels: ["≤ 0.001", "≤ 0.01", "≤ 0.1", "≤ 0.5", "more"],
      hint: " Only completions that were trained on have one.",
    },
  };

  function colourKey() {
    const scale = SCALES[state.colour];
    const key = el("p", { id: "key", hidden: !scale });
    if (scale) {
      key.append(scale.key, ...scale.labels.map((label, i) => el("span", { class: "t" + i }, label)));
      key.append(el("span", { class: "hint" }, scale.hint));
    }
    return key;
  }

  // A completion's text; by tokens if they are to be coloured and the run has logged them.
  function body(c) {
    const scale = SCALES[state.colour];
    const values = scale && c[scale.values];
    if (values && c.token_texts) {
      const spans = c.token_texts.map((text, i) =>
        el("span", { class: "t" + scale.level(values[i]), title: scale.title(values[i]) }, visible(text)),
      );
      return el("pre", {}, ...spans);
    }
    const pre = long(c.text ?? "");
    if (state.colour === "trained") pre.classList.add(c.advantage > 0 ? "up" : c.advantage < 0 ? "down" : "still");
    if (scale) pre.classList.add("unknown");
    return pre;
  }

  // Text in which the searched words are marked.
  function marked(text) {
    const shown = visible(text);
    const query = state.query.toLowerCase();
    const fragment = document.createDocumentFragment();
    const lower = shown.toLowerCase();
    let from = 0;
    for (let at = query ? lower.indexOf(query) : -1, hits = 0; at >= 0 && hits < 500; hits += 1) {
      fragment.append(shown.slice(from, at), el("mark", {}, shown.slice(at, at + query.length)));
      from = at + query.length;
      at = lower.indexOf(query, from);
    }
    fragment.append(shown.slice(from));
    return fragment;
  }

  function long(text) {
    const pre = el("pre", { tabIndex: 0 });
    if (text.length <= MAX_TEXT) {
      pre.append(marked(text));
      return pre;
    }
    const more = el("button", { type: "button" }, `Show all ${text.length} characters`);
    more.addEventListener("click", () => pre.replaceChildren(marked(text)));
    pre.append(marked(text.slice(0, MAX_TEXT)), "\n", more);
    return pre;
  }

  function samplesSection() {
    const { axis, note } = data.samples;
    const names = Object.entries(FILTERS)
      .map(([name, label]) => [name, typeof label === "string" ? label : label[axis]])
      .filter(([, label]) => label);
    const filter = el("select", { id: "filter" }, ...names.map(([value, label]) => el("option", { value }, label)));
    filter.addEventListener("change", () => {
      state.filter = filter.value;
      if (state.filter === "place") state.query = document.getElementById("query").value = "";
      choose();
    });
    const query = el("input", { type: "search", id: "query", placeholder: "prompt, response, verdict" });
    let timer;
    query.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        state.query = query.value.trim();
        choose();
      }, 250);
    });
    const colours = [
      ["none", "nothing"],
      ["logprob", "log-prob of the sampler"],
      ["gap", "difference of sampler and trainer"],
      ["trained", "trained up or down"],
    ];
    const colour = el("select", { id: "colour" }, ...colours.map(([value, label]) => el("option", { value }, label)));
    colour.addEventListener("change", () => {
      state.colour = colour.value;
      document.getElementById("key").replaceWith(colourKey());
      showGroups();
    });
    const turn = (by) => {
      state.from = Math.max(0, state.from + by * PAGE);
      showGroups();
      document.getElementById("samples").scrollIntoView();
    };
    return section(
      "samples",
      "Samples",
      note ? el("p", { class: "hint" }, visible(note)) : null,
      el(
        "div",
        { class: "tools" },
        el("label", { for: "filter" }, "Show"),
        filter,
        el("label", { for: "place" }, axis === "step" ? "Step" : "Model"),
        placePicker(),
        el("label", { for: "query" }, "Search"),
        query,
        ...(axis === "step" ? [el("label", { for: "colour" }, "Colour by"), colour] : []),
      ),
      colourKey(),
      el(
        "p",
        { class: "tools" },
        el("button", { type: "button", id: "previous", onclick: () => turn(-1) }, "Previous"),
        el("button", { type: "button", id: "next", onclick: () => turn(1) }, "Next"),
        el("output", { id: "count", role: "status" }),
      ),
      el("div", { id: "groups" }),
    );
  }

  function placePicker() {
    const select = el("select", { id: "place" });
    select.addEventListener("change", () => {
      state.place = select.value;
      state.filter = "place";
      state.query = document.getElementById("query").value = "";
      choose();
    });
    fillPlaces(select);
    return select;
  }

  function fillPlaces(select) {
    const { places } = data.samples;
    select.replaceChildren(...places.map((place) => el("option", { value: place }, visible(place))));
    select.value = state.place ?? places[places.length - 1];
  }

  // --- the page

  function linesSection(id, title, lines) {
    return lines.length ? section(id, title, el("ul", {}, ...lines.map((line) => el("li", {}, visible(line))))) : null;
  }

  function factsSection() {
    const pairs = data.facts.flatMap(([name, value]) => [el("dt", {}, visible(name)), el("dd", {}, visible(value))]);
    return section("about", data.kind === "comparison" ? "Runs" : "About", el("dl", { class: "facts" }, ...pairs));
  }

  function tablesSection(id, title, tables) {
    const made = tables
      .filter(({ rows }) => rows.length)
      .flatMap(({ title: name, note, columns, rows }) => [
        name === title ? null : el("h3", {}, visible(name)),
        note ? el("p", { class: "hint" }, visible(note)) : null,
        table(columns, rows, name),
      ]);
    return made.length ? section(id, title, ...made.filter(Boolean)) : null;
  }

  function configSection() {
    if (!data.config) return null;
    return section("config", "Config", el("details", {}, el("summary", {}, "config.yaml"), el("pre", {}, visible(data.config))));
  }

  const makers = {
    warnings: () => linesSection("warnings", "Warnings", data.warnings),
    about: factsSection,
    numbers: () => tablesSection("numbers", "Numbers", data.numbers),
    curves: () => (data.panels.length ? chartsSection() : null),
    tables: () => tablesSection("tables", "Tables", data.tables),
    samples: () => (data.samples ? samplesSection() : null),
    notes: () => linesSection("notes", "Notes", data.notes),
    config: configSection,
  };

  // Make the sections anew, but for those that keep what the reader has chosen: curves and samples.
  function show() {
    const sections = Object.entries(makers).map(([id, make]) => {
      const kept = ["curves", "samples"].includes(id) ? document.getElementById(id) : null;
      const isOpen = id === "config" && document.querySelector("#config details")?.open;
      const made = kept ?? make();
      if (isOpen) made.querySelector("details").open = true;
      return made;
    });
    const shown = sections.filter(Boolean);
    main.dataset.kind = data.kind;
    shown.forEach((made, i) => {
      const there = document.getElementById(made.id);
      if (there === made) return;
      if (there) there.replaceWith(made);
      else main.insertBefore(made, main.children[i] ?? null);
    });
    [...main.children].filter((child) => !shown.includes(child)).forEach((child) => child.remove());
    const links = shown.map((made) => el("a", { href: "#" + made.id }, made.querySelector("h2").textContent));
    document.getElementById("nav").replaceChildren(...links);
    showCharts();
    if (data.samples && !document.getElementById("groups").children.length) choose();
  }

  // --- watching a run

  async function look() {
    const live = document.getElementById("live");
    try {
      const response = await fetch("data?have=" + encodeURIComponent(data.version ?? ""));
      if (response.status === 200) {
        data = await response.json();
        const isLatest = state.filter === "place" && state.place === null && !state.query;
        show();
        if (data.samples) {
          fillPlaces(document.getElementById("place"));
          if (isLatest) choose();
        }
      }
      const asked = data.stop_requested ? " It is asked to stop: it saves a checkpoint before its next step and ends." : "";
      live.textContent = `Following ${visible(data.title)}; last change ${new Date(1000 * data.changed).toLocaleTimeString()}.${asked}`;
      document.getElementById("stop").disabled = data.stop_requested;
    } catch {
      live.textContent = "The server of this page is gone; start `tune watch` again.";
    }
    setTimeout(look, 2000);
  }

  function watchRun() {
    document.getElementById("live").hidden = false;
    const stop = document.getElementById("stop");
    stop.hidden = data.kind !== "run";
    let sure = false;
    stop.addEventListener("click", async () => {
      if (sure) await fetch("stop", { method: "POST" });
      sure = !sure;
      stop.textContent = sure ? "Really stop? Click again" : "Stop the run";
      if (sure) setTimeout(() => { sure = false; stop.textContent = "Stop the run"; }, 5000);
    });
    look();
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const paper = (isPrinting) => () => {
    document.documentElement.classList.toggle("paper", isPrinting);
    redraw();
  };
  addEventListener("beforeprint", paper(true));
  addEventListener("afterprint", paper(false));
  show();
  if (watching) watchRun();
  document.documentElement.dataset.ready = "yes";
})();
