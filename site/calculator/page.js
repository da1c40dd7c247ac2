// The calculator's page: a form whose state stands in the address, the plan as bars, the template to copy, the check.
import Ajv from "ajv";
import data from "calculator-data";
import { check } from "./checker.js";
import { GIB, UserError, configPrecision, countParameters, makePlan, makeRow, modelShape, recommend, worstMoment } from "./planner.js";

const ZH = document.documentElement.lang.startsWith("zh");
const say = (english, chinese) => (ZH ? chinese : english);
const PARTS = {
  parameters: say("parameters", "参数"), gradients: say("gradients", "梯度"), optimizer: say("optimizer states", "优化器状态"),
  activations: say("activations", "激活"), buffers: say("buffers", "缓冲区"), reserve: say("reserve", "预留"),
};
const MOMENTS = {
  "loss": say("the loss", "计算损失时"), "first gradients": say("the first gradients", "反向刚开始时"),
  "last gradients": say("the last gradients", "反向快结束时"), "optimizer step": say("the optimizer's step", "优化器更新时"),
};
const form = document.getElementById("plan"), result = document.getElementById("result");
const findings = document.getElementById("findings");
const make = (tag, attributes, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
const gib = (bytes) => (bytes / GIB).toFixed(bytes < 10 * GIB ? 2 : 1);

// ---- the address keeps the form

const fields = () => [...form.elements].filter((field) => field.name);
const usual = Object.fromEntries(fields().map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]));

function fromAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const field of fields()) {
    if (field.type === "checkbox") field.checked = said.has(field.name) ? said.get(field.name) === "1" : usual[field.name];
    else field.value = said.get(field.name) ?? usual[field.name];
  }
}

function toAddress() {
  const said = new URLSearchParams();
  for (const field of fields()) {
    const value = field.type === "checkbox" ? field.checked : field.value;
    if (value !== usual[field.name]) said.set(field.name, field.type === "checkbox" ? Number(value) : value);
  }
  history.replaceState(null, "", `#${said}`);
}

// ---- the plan

function whole(name) {
  const value = Number(form.elements[name].value);
  if (!Number.isInteger(value) || value < 1) throw new UserError(`${form.elements[name].labels[0].firstChild.textContent.trim()}: ${value}`);
  return value;
}

function asked() {
  const value = (name) => form.elements[name].value;
  return {
    gpus: whole("gpus"), gpu_mem: Number(value("gpu_mem")), micro_batch: whole("micro_batch"), seq_len: whole("seq_len"),
    loss_tiles: whole("loss_tiles"), lora_rank: whole("lora_rank"), checkpointing: Number(form.elements.checkpointing.checked),
    precision: value("precision"), trainable: value("trainable"),
  };
}

function parse(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new UserError(`${what}: ${error.message}`);
  }
}

function plan() {
  const own = form.elements.shape.value.trim();
  const shape = own ? modelShape(parse(own, "config.json")) : data.models[form.elements.model.value];
  const want = asked(), json = form.elements.config.value.trim();
  if (json) {
    const config = parse(json, "DeepSpeed JSON");
    want.precision = configPrecision(config);
    return { shape, want, rows: [makeRow(data, say("your JSON", "你的 JSON"), config, shape, want)] };
  }
  return { shape, want, rows: makePlan(data, shape, want) };
}

function barOf(row, card, scale) {
  const { moment, parts } = worstMoment(row);
  const bar = make("div", { className: "bar", title: MOMENTS[moment] });
  for (const part of Object.keys(PARTS)) {
    const piece = make("span", { className: part, title: `${PARTS[part]}: ${gib(parts[part])} GiB` });
    piece.style.width = `${Math.max(0, parts[part]) * scale}%`;
    bar.append(piece);
  }
  const limit = make("i", { title: `${gib(card)} GiB` });
  limit.style.left = `${card * scale}%`;
  bar.append(limit);
  return [bar, MOMENTS[moment]];
}

function show() {
  try {
    const { shape, want, rows } = plan(), card = want.gpu_mem * GIB, chosen = recommend(rows, want.gpus);
    const named = rows.find((row) => row.name === form.elements.template.value) ?? chosen;
    const head = ["", say("config", "配置"), say("on the card, GiB", "占用 GiB"), say("worst moment", "峰值时刻"), say("host, GiB", "主机 GiB")];
    const scale = 100 / Math.max(card, ...rows.map((row) => row.need.on_card)); // the same for all bars
    const body = rows.map((row) => {
      const [bar, moment] = barOf(row, card, scale);
      const verdict = row.fits ? say("fits", "放得下") : say("too large", "放不下");
      const host = row.host ? gib(row.host) : "–";
      const cells = [verdict, row.name, gib(row.need.on_card), moment, host].map((text) => make("td", {}, text));
      cells[2].prepend(bar);
      return make("tr", { className: row === named ? "chosen" : row.fits ? "" : "over" }, ...cells);
    });
    const count = countParameters({ ...data.usual, ...shape });
    const line = say(
      `${count.toLocaleString("en")} parameters; a card of ${want.gpu_mem} GiB is the line.`,
      `${count.toLocaleString("en")} 个参数；竖线是 ${want.gpu_mem} GiB 的显存。`,
    );
    const key = make("p", { className: "key" }, ...Object.keys(PARTS).map((part) => make("span", { className: part }, PARTS[part])));
    const table = make("table", {}, make("tr", {}, ...head.map((text) => make("th", {}, text))), ...body);
    const copy = named ? make("pre", { id: "template" }, JSON.stringify(named.config, null, 2)) : "";
    const use = named ? say(`To copy, ${named.name}:`, `可复制的 ${named.name}：`) : say("Nothing fits.", "都放不下。");
    result.replaceChildren(make("p", {}, line), key, make("div", { className: "scroll" }, table), make("p", {}, use), copy);
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    result.replaceChildren(make("p", { className: "wrong" }, error.message));
  }
  toAddress();
}

// ---- the check

const validate = new Ajv({ allErrors: true, strict: false, allowUnionTypes: true }).compile(data.schema);

function checkConfig() {
  const text = form.elements.config.value.trim();
  if (!text) return findings.replaceChildren();
  const list = check(text, validate, data.schema, data.wrong, Number(form.elements.gpus.value) || 1);
  const items = list.map(({ path, message, cure }) => make("li", {}, make("code", {}, path), ` ${message}. ${cure}`));
  const none = say("The schema and the batch equation find nothing.", "按 schema 和批次等式没有发现问题。");
  const more = say(
    "What needs more than a schema (optimizers at a stage, schedules, precision, what is ignored in silence) only python config/check.py says.",
    "schema 查不出的问题（优化器与 ZeRO 阶段、学习率调度、精度、被悄悄忽略的设置）要用 python config/check.py 检查。",
  );
  findings.replaceChildren(make("ul", {}, ...items), make("p", {}, items.length ? more : `${none} ${more}`));
}

for (const name of Object.keys(data.models)) form.elements.model.append(make("option", { value: name }, name));
for (const name of new Set([...data.one, ...data.many, ...data.lora])) form.elements.template.append(make("option", { value: name }, name));
form.elements.model.value = usual.model = "llama-3.1-8b";
fromAddress();
form.addEventListener("input", () => (show(), checkConfig()));
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", () => (fromAddress(), show(), checkConfig()));
show();
checkConfig();
