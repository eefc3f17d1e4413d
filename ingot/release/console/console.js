// The console: reads the API every second, draws, sends commands. No build step, nothing from elsewhere.
const at = (id) => document.getElementById(id);
const COLOURS = ["var(--v0)", "var(--v1)", "var(--v2)", "var(--v3)"];
const COMMANDS = [
  ["promote", "Next step", {}], ["promote --full", "Promote fully", { full: true }], ["pause", "Pause", {}],
  ["resume", "Resume", {}], ["abort", "Abort", {}], ["retry", "Retry", {}], ["undo", "Undo", {}],
];
const ASKED_TWICE = new Set(["promote --full", "abort", "undo"]);
const CHARTS = [
  ["qps", "Requests a second", (v) => v.toFixed(v < 10 ? 1 : 0)],
  ["error_rate", "Errors", (v) => `${Number((100 * v).toPrecision(2))} %`],
  ["p50", "P50", (v) => milliseconds(v)], ["p99", "P99", (v) => milliseconds(v)],
];
let chosen = decodeURIComponent(location.hash.slice(1));
let drawnHistory = [];

const milliseconds = (v) => (v == null ? "–" : `${(1000 * v).toPrecision(3)} ms`);
const percent = (v) => (v == null ? "–" : `${(100 * v).toPrecision(3)} %`);
const bytes = (v) => (v == null ? "–" : `${(v / 2 ** 20).toFixed(0)} MiB`);

function made(name, text = "", attributes = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

async function ask(path, settings) {
  const key = sessionStorage.getItem("key");
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, settings ? { method: "POST", body: JSON.stringify(settings), headers } : { headers });
  const content = await answer.json();
  at("key-form").hidden = answer.status !== 401;
  if (!answer.ok) throw new Error(content.error);
  return content;
}

// -- drawing ----------------------------------------------------------------------------------------------------------
function replaceKeepingFocus(parent, children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.id : null;
  parent.replaceChildren(...children);
  if (focused) at(focused)?.focus();
}

// A control that is drawn anew between a key's two halves would lose the press: only what changed is drawn.
function unchanged(parent, content) {
  const text = JSON.stringify(content);
  if (parent.dataset.drawn === text) return true;
  parent.dataset.drawn = text;
  return false;
}

function drawModels(rollouts) {
  if (unchanged(at("models"), [chosen, rollouts.map((rollout) => [rollout.model, rollout.phase])])) return;
  replaceKeepingFocus(at("models"), rollouts.map((rollout) => {
    const item = made("li");
    const button = made("button", `${rollout.model}: ${rollout.phase}`, { id: `model-${rollout.model}` });
    if (rollout.model === chosen) button.setAttribute("aria-current", "true");
    button.onclick = () => { chosen = rollout.model; location.hash = encodeURIComponent(chosen); refresh(); };
    item.append(button);
    return item;
  }));
}

function drawHead(found, colour) {
  at("title").textContent = `${found.model}: ${found.stable} → ${found.candidates.join(", ")}`;
  at("phase").textContent = found.phase;
  at("phase").className = found.phase;
  at("message").textContent = found.message;
  const serving = Object.entries(found.serving).map(([v, share]) => `${v} ${percent(share)}`).join(", ");
  at("serving").textContent = `Serving: ${serving || "no requests lately"}${found.in_effect ? "" : " (not yet in effect everywhere)"}`;
  const shares = Object.entries(found.weights).sort();
  at("weights").setAttribute("aria-label", `Weights: ${shares.map(([v, w]) => `${v} ${w} percent`).join(", ")}`);
  at("weights").replaceChildren(...shares.map(([version, weight]) =>
    made("span", `${version} ${weight} %`, { style: `width:${weight}%;background:${colour(version)}` })));
}

function drawCommands(found) {
  if (unchanged(at("buttons"), [found.model, found.commands, found.candidates])) return;
  replaceKeepingFocus(at("buttons"), COMMANDS.map(([name, label, settings]) => {
    const danger = name === "abort" || name === "undo";
    const button = made("button", label, { id: `do-${name.replace(" --", "-")}`, ...(danger ? { class: "danger" } : {}) });
    button.disabled = !found.commands.includes(name);
    const full = name === "promote --full" && found.candidates.length > 1 ? { ...settings, version: found.candidates[0] } : settings;
    button.onclick = () => command(found.model, name, label, full);
    return button;
  }));
  at("weight-of").textContent = found.candidates[0];
  at("do-set-weight").disabled = !found.commands.includes("set-weight");
}

function drawSteps(steps) {
  at("steps").replaceChildren(...steps.map((step) => made("li", `${step.kind} ${JSON.stringify(step.what)}`,
    { class: step.status, ...(step.status === "current" ? { "aria-current": "step" } : {}) })));
}

function table(id, head, rows) {
  const line = (cells, kind) => {
    const row = made("tr");
    row.append(...cells.map((cell) => (cell instanceof Node ? cell : made(kind, cell, kind === "th" ? { scope: "col" } : {}))));
    return row;
  };
  at(id).replaceChildren(line(head, "th"), ...rows.map((row) => line(row, "td")));
}

function drawVersions(found, colour) {
  const head = ["Version", "Requests/s", "Errors", "P50", "P90", "P99", "Queue", "Memory", "GPU memory", "Users", "Agreement", "Requests", "Retried"];
  table("versions", head, Object.entries(found.versions).map(([name, v]) => {
    const cell = made("td");
    cell.append(made("span", "", { class: "swatch", style: `background:${colour(name)}` }), name);
    return [cell, String(v.qps), percent(v.error_rate), milliseconds(v.p50), milliseconds(v.p90), milliseconds(v.p99),
      milliseconds(v.queueTime), bytes(v.cpuMemory), bytes(v.gpuMemory), String(v.users), percent(v.agreement),
      String(v.requests), String(v.retried)];
  }));
}

function chart(series, versions, [field, title, format], colour) {
  const figure = made("figure");
  const values = versions.flatMap((v) => series[v].map((p) => p[field])).filter((v) => v != null);
  const top = Math.max(...values, 0) || 1;
  const width = 300, height = 100, x = (i) => (i / (series.time.length - 1)) * width;
  const lines = versions.map((version) => {
    let path = "", down = false;
    series[version].forEach((point, i) => {
      if (point[field] == null) { down = false; return; }
      path += `${down ? "L" : "M"}${x(i).toFixed(1)} ${(height - (point[field] / top) * (height - 14)).toFixed(1)}`;
      down = true;
    });
    return `<path d="${path}" fill="none" style="stroke:${colour(version)}" stroke-width="2"/>`;
  });
  const latest = versions.map((v) => `${v} ${(series[v].findLast((p) => p[field] != null) || {})[field] == null ? "–" : format(series[v].findLast((p) => p[field] != null)[field])}`);
  figure.innerHTML = `<svg viewBox="0 0 ${width} ${height + 4}" preserveAspectRatio="none" role="img">
    <line x1="0" y1="${height}" x2="${width}" y2="${height}" stroke="var(--line)"/>${lines.join("")}</svg>`;
  figure.querySelector("svg").setAttribute("aria-label", `${title}, three minutes: ${latest.join(", ")}`);
  figure.append(made("figcaption", `${title}, up to ${format(top)}: ${latest.join(", ")}`));
  return figure;
}

function drawVerdicts(verdicts) {
  if (unchanged(at("verdicts"), [chosen, verdicts])) return;
  const open = new Set([...at("verdicts").querySelectorAll("details[open]")].map((one) => one.id));
  replaceKeepingFocus(at("verdicts"), verdicts.map((verdict) => {
    const details = made("details", "", { id: `verdict-${verdict.metric}-${verdict.version}` });
    const summary = made("summary", "", { id: `${details.id}-summary` });
    summary.append(made("strong", verdict.outcome, { class: verdict.outcome }),
      ` ${verdict.metric} of ${verdict.version}: ${verdict.reason}`);
    details.append(summary, made("pre", JSON.stringify(verdict.evidence || {}, null, 1)));
    details.open = open.has(details.id);
    return details;
  }));
  if (!verdicts.length) at("verdicts").textContent = "None yet.";
}

function drawHistory(history) {
  if (history.length === drawnHistory.length && chosen === drawnHistory.model) return;
  drawnHistory = history;
  drawnHistory.model = chosen;
  const rows = [...history].reverse().map((one) =>
    [new Date(1000 * one.time).toLocaleString(), one.actor, one.what, one.why]);
  table("history", ["When", "Who", "What", "Why"], rows);
}

function draw(found, history) {
  const names = Object.keys(found.versions).sort();
  const colour = (version) => COLOURS[names.indexOf(version) % COLOURS.length];
  drawHead(found, colour);
  drawCommands(found);
  drawSteps(found.steps);
  drawVersions(found, colour);
  at("charts").replaceChildren(...CHARTS.map((one) => chart(found.series, names, one, colour)));
  drawVerdicts(found.verdicts);
  drawHistory(history);
}

// -- talking ----------------------------------------------------------------------------------------------------------
async function refresh() {
  try {
    const { rollouts } = await ask("/api/rollouts");
    if (!rollouts.some((rollout) => rollout.model === chosen)) chosen = rollouts[0]?.model ?? "";
    drawModels(rollouts);
    at("empty").hidden = Boolean(chosen);
    at("content").hidden = !chosen;
    if (chosen) {
      const path = `/api/rollouts/${encodeURIComponent(chosen)}`;
      const [found, { history }] = await Promise.all([ask(`${path}?series=1`), ask(`${path}/history`)]);
      draw(found, history);
    }
    at("connection").textContent = "";
  } catch (error) {
    at("connection").textContent = error.message;
  }
}

// The close event comes a moment after the dialogue has closed: one that finds it open again belongs to the question before.
function confirmed(text) {
  const dialog = at("confirm");
  at("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => { dialog.onclose = () => dialog.open || resolve(dialog.returnValue === "yes"); });
}

async function command(model, name, label, settings) {
  if (ASKED_TWICE.has(name) && !(await confirmed(`${label} ${model}?`))) return;
  try {
    const found = await ask(`/api/rollouts/${encodeURIComponent(model)}/${name.split(" ")[0]}`, settings);
    at("outcome").textContent = `${label}: ${found.phase}`;
  } catch (error) {
    at("outcome").textContent = error.message;
  }
  await refresh();
}

at("weight-form").onsubmit = (event) => {
  event.preventDefault();
  command(chosen, "set-weight", "Set weight", { weights: { [at("weight-of").textContent]: Number(at("weight").value) } });
};
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  at("key").value = "";
  refresh();
};
const forever = async () => { await refresh(); setTimeout(forever, 1000); };
forever();
