"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};
const address = (job, file) => [job.folder, file].filter(Boolean).join("/").split("/").map(encodeURIComponent).join("/");
const entry = (job, record) => ({ job, record, source: address(job, record.file) });
const images = data.jobs.flatMap((job) => job.records.map((record) => entry(job, record)));
const onPage = data.files ? 200 : Infinity; // images, or rows of the table
for (const file of data.files ?? []) images.length += file.images; // they come later
const sweep = data.jobs.length > 1;
const seedOf = ({ seed }) => (seed === "original" ? seed : `seed ${seed}`);
const title = ({ job, record }) => [sweep ? job.name : "", record.prompt || "(no prompt)", seedOf(record)].filter(String).join(" · ");
const requested = new Map();
let chosen = [];
let turn = 0;

function load(number) { // a file of records, once
  if (!requested.has(number))
    requested.set(number, new Promise((done, failed) => {
      const source = `pages/${number}.js`;
      const error = () => failed(new Error(`${source} cannot be read; keep the folder pages beside this page`));
      document.head.append(make("script", { src: source, onload: done, onerror: error }));
    }));
  return requested.get(number);
}

function receive(number, text) { // what such a file calls
  const { job, first } = data.files[number];
  const { shared, own } = JSON.parse(text);
  own.forEach((record, k) => { images[first + k] = entry(data.jobs[job], Object.setPrototypeOf(record, shared)); });
}

async function need(from, to) { // the images of some positions
  const isWanted = (k) => data.files[k].first < to && data.files[k].first + data.files[k].images > from;
  await Promise.all([...data.files.keys()].filter(isWanted).map(load));
}

function thumbnail(source, text) {
  const element = make("img", { src: source, alt: text, title: text, loading: "lazy" });
  element.addEventListener("load", () => element.classList.toggle("small", element.naturalWidth < 256));
  return element;
}

function enlargeable(source, text) {
  const link = make("a", { href: source, className: "enlarge" }, thumbnail(source, text));
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    find("dialog").replaceChildren(thumbnail(source, text), make("p", { textContent: text }));
    find("dialog").showModal();
  });
  return link;
}

function metadataList(record) {
  const list = make("dl");
  for (const name in record) { // what it shares with others too
    const value = record[name];
    if (name === "prompt" || value === "" || value === null) continue;
    const text = typeof value === "object" ? JSON.stringify(value)
      : typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(4)) : String(value);
    list.append(make("dt", { textContent: name.replaceAll("_", " ") }), make("dd", { textContent: text }));
  }
  return make("details", {}, make("summary", { textContent: "metadata" }), list);
}

function compareButton(image) {
  const button = make("button", { textContent: "compare", ariaPressed: "false" });
  image.buttons = [...(image.buttons ?? []), button];
  button.addEventListener("click", () => {
    chosen = chosen.includes(image) ? chosen.filter((other) => other !== image) : [...chosen, image].slice(-2);
    showPair();
  });
  return button;
}

function card(image) {
  const { job, record, source } = image;
  const buttons = make("div", {}, compareButton(image));
  if (record.image) {
    const before = make("button", { textContent: "before | after" });
    before.addEventListener("click", () => {
      chosen = [{ job, record: Object.assign(Object.create(record), { seed: "original" }), source: address(job, record.image) }, image];
      showPair();
    });
    buttons.append(" ", before);
  }
  const caption = make("figcaption", { textContent: title(image) });
  return make("figure", {}, enlargeable(source, title(image)), caption, buttons, metadataList(record));
}

function showPair() {
  images.forEach((image) => image.buttons?.forEach((button) => { button.ariaPressed = String(chosen.includes(image)); }));
  find("#compare").hidden = chosen.length < 2;
  if (chosen.length < 2) return;
  find(".pair").replaceChildren(...chosen.map((image) => thumbnail(image.source, title(image))));
  find("#compare p").textContent = chosen.map(title).join("   |   ");
  slide();
  find("#compare").scrollIntoView({ block: "nearest" });
}

function slide() {
  const upper = find(".pair img + img");
  if (upper) upper.style.clipPath = `inset(0 0 0 ${find("#slide").value}%)`;
  find(".pair").style.setProperty("--edge", `${find("#slide").value}%`);
}

function gallery(shown) {
  return make("div", { className: "gallery" }, ...shown.map(card));
}

function rowsOf(shown) { // of the table: one for each prompt and seed
  const rows = new Map();
  for (const image of shown) {
    const key = `${image.record.seed} ${image.record.prompt}`;
    const row = rows.get(key);
    if (row) row.push(image);
    else rows.set(key, [image]);
  }
  return [...rows.values()];
}

function sideBySide(rows) {
  const heads = data.jobs.map((job) => make("th", { scope: "col", textContent: job.name }));
  const head = make("thead", {}, make("tr", {}, make("td"), ...heads));
  const body = make("tbody");
  for (const alike of rows) {
    const [{ record }] = alike;
    const row = make("tr", {}, make("th", { scope: "row", textContent: `${record.prompt || "(no prompt)"} · ${seedOf(record)}` }));
    for (const job of data.jobs) {
      const image = alike.findLast((one) => one.job === job);
      const cell = image ? make("td", {}, enlargeable(image.source, title(image)), compareButton(image)) : make("td");
      cell.dataset.job = job.name;
      row.append(cell);
    }
    body.append(row);
  }
  return make("div", { className: "scroll" }, make("table", {}, head, body));
}

async function show() {
  const words = find("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const table = find("#table").ariaPressed === "true";
  const first = (find("#page").value - 1) * onPage || 0;
  const mine = ++turn;
  if (data.files) {
    find("#images").ariaBusy = "true";
    if (words.length || table) find("#count").textContent = "reading all images…";
    try {
      await (words.length || table ? need(0, images.length) : need(first, first + onPage));
    } catch (error) {
      find("#count").textContent = error.message;
      return;
    }
    if (mine !== turn) return; // something else is to be shown by now
  }
  const shown = words.length ? images.filter(({ record }) => words.every((word) => record.prompt.toLowerCase().includes(word))) : images;
  const listed = table ? rowsOf(shown) : shown;
  const some = listed.slice(first, first + onPage);
  images.forEach((image) => { image.buttons = []; });
  find("#images").replaceChildren(table ? sideBySide(some) : gallery(some));
  find("#images").ariaBusy = "false";
  find("#count").textContent = `${shown.length} of ${images.length} images`;
  find("#last").textContent = find("#page").max = Math.max(Math.ceil(listed.length / onPage), 1);
  find("#pages").hidden = listed.length <= onPage;
  find("#back").disabled = first === 0;
  find("#forth").disabled = first + onPage >= listed.length;
  showPair();
}

function turnTo(page) {
  find("#page").value = Math.min(Math.max(Math.trunc(page) || 1, 1), find("#page").max);
  scrollTo(0, 0);
  show();
}

function times() {
  const timed = data.jobs.filter((job) => job.timings?.seconds);
  if (!timed.length) return;
  find("#times").hidden = false;
  const stages = [...new Set(timed.flatMap((job) => Object.keys(job.timings.seconds)))];
  const colour = (stage) => `hsl(${(210 + 67 * stages.indexOf(stage)) % 360} 55% 52%)`;
  const total = (job) => Object.values(job.timings.seconds).reduce((sum, seconds) => sum + seconds, 0);
  const most = Math.max(...timed.map(total)) || 1;
  for (const job of timed) {
    const bar = make("div", { className: "bar" });
    for (const stage of stages) {
      const seconds = job.timings.seconds[stage] ?? 0;
      const part = make("span", { title: `${stage}: ${seconds.toPrecision(3)} s` });
      part.style.cssText = `width: ${(100 * seconds) / most}%; background: ${colour(stage)}`;
      bar.append(part);
    }
    const rate = `${total(job).toPrecision(3)} s, ${job.timings.images_per_second.toPrecision(3)} images/s`;
    find(".bars").append(make("span", { textContent: sweep ? job.name : "" }), bar, make("span", { textContent: rate }));
  }
  for (const stage of stages) {
    const mark = make("i");
    mark.style.background = colour(stage);
    find(".legend").append(make("span", {}, mark, stage));
  }
  if (data.plot) find("#times").append(make("img", { className: "plot", src: data.plot, alt: "Seconds per image against the swept value" }));
}

function evaluations() {
  const short = (number) => String(+number.toPrecision(3));
  for (const job of data.jobs.filter((job) => job.evaluation?.metrics)) {
    const { metrics, scorer, against, distances_by: by, notes } = job.evaluation;
    const figures = Object.entries(metrics).map(([name, { value, low, high }]) => `${name.replaceAll("_", " ")} ${short(value)} (${short(low)} to ${short(high)})`);
    const how = `95% intervals; scorer ${scorer}${against ? `; against ${against}, by ${by}` : ""}`;
    find("#evaluation").hidden = false;
    find("#evaluation").append(make("p", { textContent: [sweep ? job.name : "", figures.join(" · ")].filter(String).join(": ") }), make("p", { className: "dim", textContent: [how, ...notes].join(" · ") }));
  }
}

document.title = data.title;
find("h1").textContent = data.title;
find("#table").hidden = !sweep;
find("#table").ariaPressed = String(sweep);
find("#filter").addEventListener("input", () => { find("#page").value = 1; show(); });
find("#back").addEventListener("click", () => turnTo(+find("#page").value - 1));
find("#forth").addEventListener("click", () => turnTo(+find("#page").value + 1));
find("#page").addEventListener("change", () => turnTo(+find("#page").value));
find("#slide").addEventListener("input", slide);
find("dialog").addEventListener("click", () => find("dialog").close());
find("dialog").addEventListener("close", () => find("dialog").replaceChildren());
find("#table").addEventListener("click", () => { find("#table").ariaPressed = String(find("#table").ariaPressed !== "true"); find("#page").value = 1; show(); });
show();
evaluations();
times();
