// The page at `/`: streams an answer, draws each step's draft tree, and shows what the planner thinks meanwhile.
"use strict";

const byId = (id) => document.getElementById(id);
const KEPT_STEPS = 60; // trees drawn per answer; older ones are removed so that long answers stay quick
const LOAD_INTERVAL_MS = 1000;
const EXAMPLES = { "chain:": "chain:4", "static:": "static:4-2-1", "eagle2:": "eagle2:5,4,16" }; // for policies with parameters
const LAYER = 92, ROW = 22, NODE = 84; // pixels: from layer to layer, from leaf to leaf, the width of a certain node
let running = null; // the AbortController of the answers on show
let background = null; // the AbortController of the background streams

async function call(path, body, signal) {
  const token = byId("token").value;
  const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
  const options = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const response = await fetch(path, options);
  if (response.status === 401) byId("token-label").hidden = false;
  if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message ?? response.statusText);
  return response;
}

/** The JSON objects of a server-sent event stream. */
async function* events(response) {
  let rest = "";
  for await (const bytes of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + bytes).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function problem(error) {
  if (error.name === "AbortError") return;
  byId("problem").textContent = String(error.message ?? error);
  byId("problem").hidden = false;
}

// Answers

class Answer {
  constructor(policy) {
    this.policy = policy;
    this.text = "";
    this.started = performance.now();
    this.root = document.createElement("section");
    this.root.className = "card answer";
    this.root.innerHTML = `<h2></h2><p class="quiet" aria-live="polite"></p><pre></pre><div class="trees"></div>`;
    [this.title, this.status, this.pre, this.trees] = this.root.children;
    this.title.textContent = policy;
    this.tokens = this.steps = this.nodes = 0;
    byId("answers").append(this.root);
  }

  async run(request, signal) {
    const response = await call("v1/chat/completions", { ...request, policy: this.policy }, signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      this.append(choice.delta.content ?? "");
      if (choice.finish_reason) this.finish(event.treeline, choice.finish_reason);
      else if (event.treeline) this.step(event.treeline);
    }
  }

  append(text) {
    this.text += text;
    this.pre.querySelector(".fresh")?.classList.remove("fresh");
    const span = document.createElement("span");
    span.className = "fresh";
    span.textContent = text;
    this.pre.append(span);
    this.pre.scrollTop = this.pre.scrollHeight;
  }

  step(step) {
    this.steps += 1;
    this.tokens += 1 + step.accepted_nodes;
    this.nodes += step.verified_nodes;
    const seconds = (performance.now() - this.started) / 1000;
    this.status.textContent = `${this.tokens} tokens, ${(this.tokens / seconds).toFixed(0)} per second, ` +
      `${(this.tokens / this.steps).toFixed(2)} a step, ${(this.nodes / this.steps).toFixed(1)} nodes verified`;
    this.trees.prepend(drawStep(step));
    if (this.trees.children.length > KEPT_STEPS) this.trees.lastChild.remove();
  }

  finish(summary, reason) {
    this.pre.querySelector(".fresh")?.classList.remove("fresh");
    this.status.textContent += ` · ${reason} after ${summary.total_s.toFixed(2)} s, seed ${summary.seed}`;
  }
}

/** One step: its figures, and its tree if the step has nodes. */
function drawStep(step) {
  const row = document.createElement("div");
  row.className = "step";
  const why = document.createElement("div");
  why.className = "why";
  why.textContent = `${step.accepted_nodes} of ${step.verified_nodes} accepted, ${step.drafted_nodes} drafted · ` +
    `${step.price.toFixed(0)} tok/s · ${(1000 * step.step_s).toFixed(0)} ms`;
  why.title = step.reason;
  row.append(why);
  if (step.nodes?.length) row.append(drawTree(step.nodes));
  return row;
}

function drawTree(nodes) {
  const rows = nodes.map((node, index) => ({ ...node, id: index, parentId: node.parent < 0 ? "root" : node.parent }));
  const root = d3.stratify()([{ id: "root", parentId: "" }, ...rows]);
  d3.tree().nodeSize([ROW, LAYER]).separation(() => 1)(root);
  const [top, bottom] = d3.extent(root.descendants(), (node) => node.x);
  const svg = d3.create("svg")
    .attr("width", root.height * LAYER + 12).attr("height", bottom - top + ROW + 6)
    .attr("role", "img").attr("aria-label", `Draft tree of ${nodes.length} nodes`);
  const place = svg.append("g").attr("transform", `translate(${8 - LAYER}, ${ROW / 2 + 3 - top})`);
  const fate = (node) => node.data.fate;
  const width = (node) => 10 + (NODE - 14) * node.data.probability;
  place.selectAll(".edge").data(root.links().filter((link) => link.source.depth)).join("path")
    .attr("class", (link) => `edge ${fate(link.target)}`)
    .attr("d", d3.linkHorizontal().source((l) => [l.source.y + width(l.source), l.source.x]).target((l) => [l.target.y, l.target.x]));
  const node = place.selectAll(".node").data(root.descendants().slice(1)).join("g")
    .attr("class", (d) => `node ${fate(d)}`).attr("tabindex", 0)
    .attr("transform", (d) => `translate(${d.y}, ${d.x})`);
  node.append("rect").attr("y", -8).attr("height", 16).attr("rx", 3).attr("width", width);
  node.append("text").attr("x", 4).attr("dy", "0.33em").text((d) => visible(d.data.text));
  node.append("title").text((d) =>
    `${JSON.stringify(d.data.text)}: ${fate(d)}\nacceptance ${d.data.probability.toFixed(3)}\nworth ${d.data.gain.toFixed(3)} tokens`);
  return svg.node();
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "·").slice(0, 11);

async function send() {
  byId("problem").hidden = true;
  running?.abort();
  const mine = running = new AbortController();
  byId("answers").replaceChildren();
  byId("stop").disabled = false;
  const request = {
    messages: [{ role: "user", content: byId("prompt").value }], stream: true, explain: "tree",
    max_tokens: Number(byId("tokens").value), temperature: Number(byId("temperature").value),
    seed: Math.floor(Math.random() * 2 ** 31),
  };
  const policies = [byId("policy").value, byId("second").value].filter(Boolean);
  const answers = policies.map((policy) => new Answer(policy));
  try {
    await Promise.all(answers.map((answer) => answer.run(request, mine.signal)));
    if (answers.length === 2) compare(...answers);
  } catch (error) {
    problem(error);
  } finally {
    if (running === mine) byId("stop").disabled = true;
  }
}

/** The proof that a policy changes the time and not the text. */
function compare(one, other) {
  const same = one.text === other.text;
  const verdict = document.createElement("p");
  verdict.id = "verdict";
  verdict.className = same ? "same" : "differs";
  verdict.textContent = same
    ? `Both answers are the same ${one.text.length} characters.`
    : "The answers differ: with bfloat16 near ties may fall the other way.";
  byId("answers").prepend(verdict);
  verdict.style.gridColumn = "1 / -1";
}

// Load: background streams are choices of one request, since a browser opens few connections to one host.

async function setLoad() {
  const count = Number(byId("load").value);
  byId("load-count").textContent = count;
  background?.abort();
  const mine = background = new AbortController();
  while (count && !mine.signal.aborted) {
    try {
      const body = {
        messages: [{ role: "user", content: "Tell me a long story about a mountain." }],
        stream: true, n: count, max_tokens: 256, temperature: 1, ignore_eos: true,
      };
      for await (const _ of events(await call("v1/chat/completions", body, mine.signal)));
    } catch (error) {
      problem(error);
      await new Promise((resume) => setTimeout(resume, LOAD_INTERVAL_MS));
    }
  }
}

// The live figures

const FIGURES = [
  ["running", (l) => l.num_requests_running],
  ["waiting", (l) => l.num_requests_waiting],
  ["tokens per second", (l) => l.tokens_per_s.toFixed(0)],
  ["price, tok/s", (l) => l.price.toFixed(0)],
  ["nodes a step", (l) => l.mean_tree_nodes.toFixed(1)],
  ["tokens a step", (l) => l.mean_accepted_length.toFixed(2)],
  ["plan", (l) => l.plan_version],
  ["drafter", (l) => (l.drafter_ready ? "ready" : "away")],
];

async function refresh() {
  try {
    const load = await (await call("load")).json();
    byId("live").replaceChildren(...FIGURES.map(([name, of]) => {
      const figure = document.createElement("div");
      figure.innerHTML = `<span class="quiet">${name}</span><b></b>`;
      figure.lastChild.textContent = of(load);
      return figure;
    }));
    if (!byId("policy").options.length) await begin();
  } catch (error) {
    byId("model").textContent = `not reachable: ${error.message}`;
  }
  setTimeout(refresh, LOAD_INTERVAL_MS);
}

async function begin() {
  const model = (await (await call("v1/models")).json()).data[0];
  byId("model").textContent = `${model.id}, ${model.max_model_len} tokens of context`;
  const named = model.treeline.policies.map((name) => EXAMPLES[name] ?? name);
  byId("policy").replaceChildren(...named.map((name) => new Option(name, name, name === model.treeline.default_policy)));
  byId("policy").value = model.treeline.default_policy;
  byId("second").replaceChildren(new Option("nothing", ""), ...named.map((name) => new Option(name, name)));
}

byId("send").onclick = send;
byId("stop").onclick = () => running?.abort();
byId("load").onchange = setLoad;
byId("load").oninput = () => (byId("load-count").textContent = byId("load").value);
byId("token").onchange = () => (byId("token-label").hidden = true);
byId("prompt").addEventListener("keydown", (event) => event.ctrlKey && event.key === "Enter" && send());
refresh();
