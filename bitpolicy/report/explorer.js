// Draws the section "Explore sizes" from the JSON beside it. Text from files is only ever set as text, never as HTML.
"use strict";
(() => {
  const root = document.querySelector(".explorer");
  const data = JSON.parse(document.querySelector('script[type="application/json"]').textContent);
  const { formats, choices, layers, points } = data;
  const hasErrors = points.every((point) => point.error !== null);
  let at = data.start;

  // Elements and numbers

  const put = (parent, tag, attributes = {}, ...content) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...content);
    parent?.append(made);
    return made;
  };
  const draw = (parent, tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    parent.append(made);
    return made;
  };
  const whole = new Intl.NumberFormat("en").format;
  const size = (bytes) => {
    const [unit, name] = bytes >= 1e9 ? [1e9, "GB"] : bytes >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
    return `${(bytes / unit).toPrecision(3)} ${name}`;
  };
  const small = (number) => (number === null ? "" : number === 0 ? "0" : number.toExponential(1));
  const share = (bytes) => `${((100 * bytes) / data.reference).toFixed(1)}%`;
  const decibels = (error) => -10 * Math.log10(error);
  const choice = (layer) => choices[points[at].choices[layer]];
  const paint = (element, format) => {
    element.style.backgroundColor = format.color;
    element.style.color = format.ink;
    element.classList.toggle("striped", format.striped > 0);
    element.textContent = format.letter;
  };

  // The chart and the slider

  // Above this PSNR, nothing is left to see, and the interesting part of the line would be flat.
  const HIGHEST = 65;
  const height = (point) => (point.psnr === null ? point.error && decibels(point.error) : Math.min(point.psnr, HIGHEST));
  const drawn = points.flatMap((point, index) => (height(point) ? [index] : []));
  const chart = drawn.length > 1 ? chartOf() : null;

  function chartOf() {
    const svg = draw(root, "svg", { class: "chart", role: "img", "aria-label": "Quality against size" });
    const heights = drawn.map((index) => height(points[index]));
    const [low, high] = [Math.min(...heights), Math.max(...heights)];
    const [least, most] = [points[0].bytes, points.at(-1).bytes];
    const place = (index, box) => [
      8 + ((points[index].bytes - least) / (most - least || 1)) * (box.width - 16),
      22 + ((high - (height(points[index]) ?? high)) / (high - low || 1)) * (box.height - 34),
    ];
    const level = (decibel, box) => 22 + ((high - decibel) / (high - low || 1)) * (box.height - 34);
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const x = event.clientX - box.left;
      const far = (index) => Math.abs(place(index, box)[0] - x);
      go(points.map((_, index) => index).reduce((best, index) => (far(index) < far(best) ? index : best)));
    };
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointermove", (event) => event.buttons && follow(event));
    return () => {
      const box = svg.getBoundingClientRect();
      svg.replaceChildren();
      const marks = points[drawn[0]].psnr === null ? [low, high] : [30, 40, 50].filter((db) => db > low && db < high);
      for (const db of marks) {
        const y = level(db, box);
        draw(svg, "line", { class: "rule", x1: 0, x2: box.width, y1: y, y2: y });
        draw(svg, "text", { x: box.width, y: y - 3, "text-anchor": "end" }, `${db.toFixed(0)} dB`);
      }
      const what = points[drawn[0]].psnr === null ? "predicted error, dB below the signal" : `estimated PSNR, up to ${HIGHEST} dB`;
      draw(svg, "text", { x: 0, y: 12 }, what);
      const path = drawn.map((index) => place(index, box).join(",")).join(" ");
      draw(svg, "polyline", { class: "line", points: path });
      for (const index of drawn) {
        const [x, y] = place(index, box);
        draw(svg, "circle", { class: "dot", cx: x, cy: y, r: 2.5 });
      }
      const [x, y] = place(at, box);
      draw(svg, "line", { class: "rule", x1: x, x2: x, y1: y, y2: box.height });
      draw(svg, "circle", { class: "here", cx: x, cy: y, r: 6 });
    };
  }

  const label = put(root, "label", { class: "size" }, "Size of the policy");
  const slider = put(label, "input", { type: "range", min: 0, max: points.length - 1, value: at });
  slider.addEventListener("input", () => go(Number(slider.value)));
  const ends = put(root, "div", { class: "ends" });
  put(ends, "span", {}, `smallest, ${size(points[0].bytes)}`);
  put(ends, "span", {}, `FP16, ${size(data.reference)}`);
  const facts = put(root, "dl", { class: "facts", "aria-live": "polite" });
  const verdict = put(root, "p", { class: "verdict" });
  const source = put(root, "p", { class: "small" });

  function drawFacts() {
    const point = points[at];
    slider.setAttribute("aria-valuetext", `${size(point.bytes)}, ${share(point.bytes)} of FP16`);
    facts.replaceChildren();
    const fact = (name, value, note = "") => {
      const box = put(facts, "div");
      put(box, "dt", {}, name);
      put(put(box, "dd", {}, value), "small", {}, note);
    };
    fact("size", size(point.bytes), `${whole(point.bytes)} bytes`);
    fact("share of FP16", share(point.bytes));
    fact("bits per weight", ((8 * point.bytes) / data.parameters).toFixed(2), "of all tensors and parameters");
    if (point.error === null) fact("predicted error", "none", "this probe predicts no error of the image");
    else if (point.error === 0) fact("predicted error", "0", `of the ${data.measure}`);
    else fact("predicted error", small(point.error), `${decibels(point.error).toFixed(1)} dB below the ${data.measure}`);
    if (point.psnr !== null) {
      const known = at === data.own && data.measured?.startsWith("the policy");
      fact(known ? "measured PSNR" : "estimated PSNR", `${point.psnr.toFixed(1)} dB`, known ? "mean of the held-out samples" : "from the predicted error");
    }
  }

  const words = [
    [50, "no pixel moves by a visible amount (above 50 dB)"],
    [40, "the differences are hard to see side by side (40 to 50 dB)"],
    [30, "small differences show (30 to 40 dB)"],
    [-Infinity, "the images are visibly different (below 30 dB)"],
  ];

  function drawVerdict() {
    const point = points[at];
    const own = at === data.own ? "This is the policy that the folder holds. " : "";
    verdict.textContent = own + (point.error === 0 ? "Nothing is lost: the images are those of FP16." : inWords(point));
    source.textContent = data.measured === null ? "" : firstLoss();
  }

  function inWords(point) {
    if (point.psnr === null) return "No PSNR was measured in this folder, so the page cannot say what one would see.";
    const [, text] = words.find(([limit]) => point.psnr >= limit);
    const levels = 255 * 10 ** (-point.psnr / 20);
    return `At ${point.psnr.toFixed(1)} dB ${text}: a typical pixel is off by ${levels.toPrecision(2)} of 255 levels.`;
  }

  function firstLoss() {
    const from = `Other PSNRs are estimated from that of ${data.measured}, which was measured: twice the predicted error costs 3 dB. They may be a few dB off.`;
    const lost = points.findLast((point) => point.psnr !== null && point.psnr < 40);
    if (!lost) return `By the estimate, even the smallest policy stays above 40 dB, where differences start to show. ${from}`;
    const above = points[points.indexOf(lost) + 1] ?? lost;
    return `By the estimate, the first visible loss begins below ${size(above.bytes)} (${share(above.bytes)} of FP16), where the PSNR falls under 40 dB. ${from}`;
  }

  // The policy as a file

  const download = put(root, "p");
  if (data.header === null) {
    download.textContent = "This folder holds no policy.yaml, so the page does not know the model's hash and cannot write a policy for it. ";
    put(download, "code", {}, "search-policy --budget SIZE");
    download.append(" makes one.");
  } else {
    const button = put(download, "button", { class: "act", type: "button" }, "Download policy.yaml");
    button.addEventListener("click", save);
    download.append("It holds the choices and no calibration. This rounds and corrects again, and writes the checkpoint: ");
    put(download, "code", {}, data.command);
  }

  // JSON strings are YAML, except for characters that YAML does not print.
  const quoted = (value) =>
    JSON.stringify(value).replace(
      /[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g,
      (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`,
    );
  const settings = ({ format, quantizer, bias }) => ({
    format: formats[format].name,
    ...(formats[format].packed && { quantizer, bias_correction: bias }),
  });

  function policyText() {
    const point = points[at];
    const used = [...new Set(point.choices.map((index) => formats[choices[index].format]))];
    const result = { policy_bytes: point.bytes, ...(point.error !== null && { predicted_error: point.error }) };
    return [
      data.header.trimEnd(),
      "formats:",
      ...used.map(({ name, parameters }) => `  ${quoted(name)}: ${quoted(parameters)}`),
      "layers:",
      ...layers.map(({ name }, index) => `  ${quoted(name)}: ${quoted(settings(choice(index)))}`),
      `result: ${quoted(result)}`,
      `provenance: ${quoted({ search: "chosen in a report, from the sensitivity table" })}`,
      "",
    ].join("\n");
  }

  function save() {
    const address = URL.createObjectURL(new Blob([policyText()], { type: "application/yaml" }));
    put(null, "a", { href: address, download: "policy.yaml" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  // The map

  put(root, "h3", {}, "The network");
  put(root, "p", { class: "small" }, "One cell per layer, in network order; a wider cell has more parameters. Point at a cell, or move with the arrow keys, for its numbers; click it to find it in the table.");
  const legend = put(root, "ul", { class: "legend" });
  const map = put(root, "div", { class: "map" });
  const tip = put(root, "div", { class: "tip", role: "status", hidden: "" });
  // Widths follow the side of a square with as many weights, and shrink if there are many layers.
  const sides = layers.map((layer) => Math.sqrt(layer.parameters));
  const stretch = Math.max(8 / Math.max(...sides), Math.min(60 / Math.max(...sides), 6000 / sides.reduce((a, b) => a + b)));
  let row = null;
  const cells = layers.map((layer, index) => {
    if (layer.stage !== layers[index - 1]?.stage) {
      const stage = put(map, "div", { class: "stage", role: "group", "aria-label": layer.stage });
      put(stage, "span", {}, layer.stage);
      row = put(stage, "div", { class: "cells" });
    }
    const cell = put(row, "button", { class: "cell", type: "button", tabindex: index ? -1 : 0 });
    cell.style.width = `${20 + stretch * sides[index]}px`;
    cell.addEventListener("pointerenter", () => showTip(index));
    cell.addEventListener("focus", () => showTip(index));
    cell.addEventListener("pointerleave", hideTip);
    cell.addEventListener("blur", hideTip);
    cell.addEventListener("click", () => findInTable(layer.name));
    return cell;
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    const next = step && cells[cells.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  function drawMap() {
    cells.forEach((cell, index) => {
      const format = formats[choice(index).format];
      paint(cell, format);
      cell.setAttribute("aria-label", `${layers[index].name}, ${format.name}`);
    });
    legend.replaceChildren();
    formats.forEach((format, index) => {
      const here = layers.flatMap((layer, place) => (choice(place).format === index ? [layer.bytes[index]] : []));
      const entry = put(legend, "li");
      paint(put(entry, "span", { class: "swatch" }), format);
      const nbytes = here.length ? `, ${size(here.reduce((sum, bytes) => sum + bytes, 0))}` : "";
      entry.append(`${format.name}: ${here.length} ${here.length === 1 ? "layer" : "layers"}${nbytes}`);
    });
  }

  function showTip(index) {
    const layer = layers[index];
    const { format, quantizer, bias } = choice(index);
    tip.replaceChildren();
    put(tip, "b", {}, layer.name);
    put(tip, "div", {}, `${layer.role}, ${layer.stage}; ${layer.shape}, ${whole(layer.parameters)} parameters`);
    if (formats[format].packed) put(tip, "div", {}, `${formats[format].name}, ${quantizer}${bias ? ", bias corrected" : ""}`);
    const table = put(tip, "table");
    const head = put(table, "tr");
    for (const name of ["", "bytes", hasErrors ? "error" : "score"]) put(head, "th", {}, name);
    formats.forEach(({ name }, place) => {
      const row = put(table, "tr", place === format ? { class: "on" } : {});
      const bytes = layer.bytes[place];
      put(row, "td", {}, name);
      put(row, "td", { class: "n" }, bytes === null ? "does not fit" : whole(bytes));
      put(row, "td", { class: "n" }, small(layer.error[place]));
    });
    tip.hidden = false;
    const [box, own, page] = [cells[index].getBoundingClientRect(), tip.getBoundingClientRect(), document.documentElement];
    const left = Math.min(box.left, page.clientWidth - own.width - 8);
    const below = box.bottom + own.height + 8 < page.clientHeight;
    tip.style.left = `${Math.max(8, left) + scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 6 : box.top - own.height - 6) + scrollY}px`;
  }
  function hideTip() {
    tip.hidden = true;
  }

  // The table

  const columns = [
    { name: "layer", of: (i) => layers[i].name },
    { name: "role", of: (i) => layers[i].role },
    { name: "stage", of: (i) => layers[i].stage },
    { name: "shape", of: (i) => layers[i].shape, by: (i) => layers[i].parameters },
    { name: "parameters", of: (i) => layers[i].parameters, show: whole },
    { name: "format", of: (i) => formats[choice(i).format].name, by: (i) => choice(i).format, moves: true },
    { name: "bytes", of: (i) => layers[i].bytes[choice(i).format], show: whole, moves: true },
    { name: hasErrors ? "error" : "score", of: (i) => layers[i].error[choice(i).format], show: small, moves: true },
    ...formats.flatMap(({ name, packed }, place) =>
      packed ? [{ name: `as ${name}`, of: (i) => layers[i].error[place], show: small }] : [],
    ),
  ];
  let sorted = { column: null, falling: false };
  put(root, "h3", {}, "The layers");
  const filters = put(root, "div", { class: "filters" });
  const find = put(put(filters, "label", {}, "Find"), "input", { type: "search", placeholder: "part of a name" });
  const role = put(put(filters, "label", {}, "Role"), "select");
  put(role, "option", { value: "" }, "all roles");
  for (const name of [...new Set(layers.map((layer) => layer.role))].sort()) put(role, "option", { value: name }, name);
  const found = put(filters, "span", { class: "small", role: "status" });
  const table = put(put(root, "div", { class: "layers", tabindex: 0 }), "table");
  const head = put(put(table, "thead"), "tr");
  const body = put(table, "tbody");
  const headers = columns.map((column) => {
    const cell = put(head, "th", { scope: "col", ...(column.show && { class: "n" }) });
    put(cell, "button", { type: "button" }, column.name).addEventListener("click", () => sortBy(column));
    return cell;
  });
  const lines = layers.map((_, index) => {
    const line = put(null, "tr");
    for (const column of columns) put(line, "td", column.show ? { class: "n" } : {}, shownIn(column, index));
    return { line, index };
  });
  find.addEventListener("input", drawRows);
  role.addEventListener("change", drawRows);

  function sortBy(column) {
    const again = sorted.column === column;
    sorted = { column, falling: again ? !sorted.falling : Boolean(column.show) };
    headers.forEach((cell, place) => {
      if (columns[place] === column) cell.setAttribute("aria-sort", sorted.falling ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    drawRows();
  }

  function compare(one, two) {
    const key = sorted.column.by ?? sorted.column.of;
    const [a, b] = [key(one.index), key(two.index)];
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return sorted.falling ? -order : order;
  }

  function shownIn({ of, show }, index) {
    const value = of(index);
    return value === null ? "" : show ? show(value) : value;
  }

  // What follows the slider.
  function drawChoices() {
    columns.forEach((column, place) => {
      if (!column.moves) return;
      for (const { line, index } of lines) line.cells[place].textContent = shownIn(column, index);
    });
    drawRows();
  }

  function drawRows() {
    const text = find.value.trim().toLowerCase();
    const wanted = ({ name, role: own }) => name.toLowerCase().includes(text) && (!role.value || own === role.value);
    const shown = lines.filter(({ index }) => wanted(layers[index]));
    if (sorted.column) shown.sort(compare);
    if (shown.length !== body.rows.length || shown.some(({ line }, place) => body.rows[place] !== line)) {
      body.replaceChildren(...shown.map(({ line }) => line));
    }
    found.textContent = `${shown.length} of ${layers.length} layers`;
  }

  function findInTable(name) {
    find.value = name;
    role.value = "";
    drawRows();
    table.parentElement.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  // The images

  if (data.pairs.length) drawPairs();

  function drawPairs() {
    put(root, "h3", {}, "Original and policy");
    const about = "The images of compare.png: held-out prompts, drawn by the original and by the policy that the folder holds. They do not follow the slider above.";
    put(root, "p", { class: "small" }, about);
    const thumbs = put(root, "div", { class: "thumbs" });
    const wipe = put(root, "div", { class: "wipe" });
    const below = put(wipe, "img", { alt: "the policy's image" });
    const above = put(wipe, "img", { alt: "the original's image" });
    const edge = put(wipe, "i");
    const cover = put(root, "label", { class: "uncover small" }, "left of the line: the original; right: the policy");
    const range = put(cover, "input", { type: "range", min: 0, max: 100, value: 50 });
    const uncover = () => {
      above.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
      edge.style.left = `${range.value}%`;
    };
    range.addEventListener("input", uncover);
    const buttons = data.pairs.map(([original], index) => {
      const button = put(thumbs, "button", { type: "button", "aria-label": `pair ${index + 1}` });
      put(button, "img", { src: original, alt: "" });
      button.addEventListener("click", () => pick(index));
      return button;
    });
    const pick = (index) => {
      [above.src, below.src] = data.pairs[index];
      buttons.forEach((button, place) => button.setAttribute("aria-pressed", place === index));
    };
    pick(0);
    uncover();
  }

  function go(index) {
    at = index;
    slider.value = index;
    chart?.();
    drawFacts();
    drawVerdict();
    drawMap();
    drawChoices();
    hideTip();
  }

  window.bitpolicy = { go, policyText, point: () => at };
  window.addEventListener("resize", () => chart?.());
  go(at);
})();
