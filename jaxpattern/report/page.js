"use strict";
// Colors the columns of a response in their context. Only what is on the screen is drawn, and text
// reaches the page as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const SCREEN = 2000; // columns drawn at once
  const RAISED = Object.fromEntries([..."-0123456789"].map((c, i) => [c, "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"[i]]));
  const CONTEXT = 8; // tokens on either side of an extreme one

  const unpack = (text, Kind) => {
    const said = atob(text), bytes = new Uint8Array(said.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = said.charCodeAt(i);
    return new Kind(bytes.buffer);
  };

  const make = (name, text = "", kind = "") => {
    const element = document.createElement(name);
    if (text) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  const general = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(3))) : "nan");

  // `value ± error`, the error to two digits.
  const measured = (value, error) => {
    if (!Number.isFinite(error)) return general(value);
    if (!Number.isFinite(value) || error <= 1e-6 * Math.abs(value)) return `${general(value)} ± ${general(error)}`;
    const top = Math.floor(Math.log10(Math.max(Math.abs(value), error)));
    const place = 1 - Math.floor(Math.log10(error));
    if (top >= -4 && top < 6 && place <= 7) {
      const digits = Math.max(place, 0);
      return `${value.toFixed(digits)} ± ${error.toFixed(digits)}`;
    }
    const digits = Math.min(Math.max(place + top, 0), 6);
    const part = (x) => (x / 10 ** top).toFixed(digits);
    return `(${part(value)} ± ${part(error)})e${top}`;
  };

  const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "→\t").replace(/[\0-\x08\x0b-\x1f\x7f]/g, "·");
  const onOneLine = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/[\0-\x1f\x7f]/g, "·");

  // The text of the columns of a probe set: column i of sequence s is the token at(s, i).
  const textOf = (name, shape) => {
    const given = Object.hasOwn(data.tokens, name) && data.tokens[name];
    if (!given) return { first: 0, known: false, at: (s, i) => (shape[1] > 1 ? `${i} ` : `sample ${s}`) };
    const ids = unpack(given.ids, Int32Array);
    const first = given.length - shape[1]; // tokens in front that have no loss
    return { first, known: true, at: (s, i) => given.vocabulary[ids[s * given.length + first + i]] };
  };

  class Viewer {
    constructor(root, view) {
      this.root = root;
      this.view = view;
      root.append(document.getElementById("viewer").content.cloneNode(true));
      this.find = (name) => root.querySelector(`.${name}`);
      this.names = Object.keys(view.probes);
      [this.texts, this.losses, this.counted] = [0, 0, 0].map(() => Object.create(null));
      this.kept = new Map();
      for (const name of this.names) {
        const { shape, counted } = view.probes[name];
        this.texts[name] = textOf(name, shape);
        this.losses[name] = Object.hasOwn(data.losses, name) && unpack(data.losses[name], Float32Array);
        this.counted[name] = counted && unpack(counted, Uint8Array);
      }
      this.find("title").textContent = view.title;
      this.fill("choice", view.rows.map((row, k) => [`row ${k}`, row]));
      if (view.directions) this.fill("choice", view.directions.loadings.map((_, k) => [`direction ${k}`, `direction ${k}`]));
      this.fill("probe", this.names.map((name) => [name, name]));
      const errors = Object.values(view.probes)[0].errors;
      for (const label of root.querySelectorAll(".only-errors")) label.hidden = !errors;
      this.find("only-texts").hidden = !this.names.some((name) => this.texts[name].known);
      this.choice = "row 0"; this.screen = 0; this.here = null;
      this.listen();
      this.open(this.names[0], 0);
    }

    fill(name, options) {
      for (const [value, text] of options) {
        const option = make("option", text);
        option.value = value;
        this.find(name).append(option);
      }
    }

    label() {
      return this.find("choice").selectedOptions[0].textContent;
    }

    // Values and errors of a probe set under the present choice.
    numbers(name) {
      const key = JSON.stringify([name, this.choice]);
      if (!this.kept.has(key)) {
        if (this.kept.size > 24) this.kept.clear();
        this.kept.set(key, this.compute(this.view.probes[name]));
      }
      return this.kept.get(key);
    }

    compute(probe) {
      const [kind, index] = this.choice.split(" ");
      const row = (k) => unpack(probe.values[k], Float32Array);
      if (kind === "row") {
        return { values: row(index), errors: probe.errors && unpack(probe.errors[index], Float32Array) };
      }
      // c = Σ_i v_i (χ_i − center_i) / scale_i
      const { rows, center, scale, loadings } = this.view.directions;
      const values = new Float32Array(probe.shape[0] * probe.shape[1]);
      rows.forEach((k, i) => {
        const chi = row(k), factor = loadings[index][i] / scale[i];
        for (let j = 0; j < chi.length; j++) values[j] += factor * (chi[j] - center[i]);
      });
      return { values, errors: null };
    }

    each(act) {
      for (const name of this.names) {
        const { values, errors } = this.numbers(name), counted = this.counted[name];
        for (let j = 0; j < values.length; j++) {
          if ((!counted || counted[j]) && Number.isFinite(values[j])) act(name, j, values[j], errors && errors[j]);
        }
      }
    }

    // What 99 of 100 columns stay below, over all probe sets: full color.
    measure() {
      const sizes = [];
      this.each((_, __, value) => sizes.push(Math.abs(value - this.view.center)));
      const sorted = Float32Array.from(sizes).sort();
      this.top = sorted[Math.ceil(0.99 * sorted.length) - 1] || sorted[sorted.length - 1] || 1;
      const { center } = this.view, unit = this.choice.startsWith("row") ? this.view.unit : "standard deviations";
      const power = center ? 0 : 3 * Math.floor(Math.log10(this.top) / 3);
      this.divisor = 10 ** power;
      this.power = power ? `10${String(power).replace(/./g, (c) => RAISED[c])}` : "";
      this.find("low").textContent = general((center - this.top) / this.divisor);
      this.find("high").textContent = general((center + this.top) / this.divisor);
      this.find("cap").textContent = `${this.power && `· ${this.power} `}${unit}; one column in a hundred lies beyond and has the last color.${this.names.some((name) => this.counted[name]) ? " Struck out: excluded, of weight 0." : ""}`;
    }

    // A value and its error, in the power of ten of the present choice.
    said(values, errors, j) {
      return measured(values[j] / this.divisor, errors ? errors[j] / this.divisor : NaN);
    }

    // A screen: some whole sequences, or a piece of one that is long.
    layout() {
      const [count, length] = this.view.probes[this.name].shape;
      this.pieces = Math.max(1, Math.ceil(length / SCREEN));
      this.piece = Math.max(1, Math.ceil(length / this.pieces));
      this.together = length > 1 ? Math.max(1, Math.floor(SCREEN / this.piece)) : 100;
      this.screens = Math.max(1, Math.ceil((count * this.pieces) / this.together));
      this.find("sequence").max = count - 1;
      this.find("text").classList.toggle("short", length <= 160);
    }

    open(name, sequence, column = 0) {
      this.name = name;
      this.find("probe").value = name;
      this.layout();
      this.screen = Math.floor((sequence * this.pieces + Math.floor(column / this.piece)) / this.together);
      this.draw();
    }

    draw() {
      const [count, length] = this.view.probes[this.name].shape, text = this.texts[this.name];
      this.screen = Math.min(Math.max(this.screen, 0), this.screens - 1);
      const begin = this.screen * this.together, end = Math.min(begin + this.together, count * this.pieces);
      const fragment = document.createDocumentFragment();
      this.chips = [];
      for (let block = begin; block < end; block++) {
        const s = Math.floor(block / this.pieces), from = (block % this.pieces) * this.piece;
        const part = make("div", "", "block");
        part.append(make("b", length > 1 ? `${this.name} ${s}` + (from ? `, from ${from}` : "") : `${s}`));
        for (let i = from ? from : -text.first; i < Math.min(from + this.piece, length); i++) {
          const chip = make("span", visible(text.at(s, i)), "token given");
          if (i >= 0) {
            chip.dataset.at = s * length + i;
            this.chips.push(chip);
          }
          part.append(chip);
        }
        fragment.append(part);
      }
      this.find("text").replaceChildren(fragment);
      this.find("text").scrollTop = 0;
      const first = Math.floor(begin / this.pieces), last = Math.floor((end - 1) / this.pieces);
      this.find("sequence").value = first;
      this.find("where").textContent = `${this.name}: ${first === last ? first : `${first} to ${last}`} of ${count}, counted from 0 (screen ${this.screen + 1} of ${this.screens})`;
      this.find("before").disabled = this.screen === 0;
      this.find("after").disabled = this.screen === this.screens - 1;
      this.here = null;
      this.paint();
    }

    paint() {
      if (this.measuredFor !== this.choice) {
        this.measure();
        this.measuredFor = this.choice;
        this.extremes();
      }
      const { values, errors } = this.numbers(this.name), counted = this.counted[this.name];
      const clear = errors && this.find("clear").checked, center = this.view.center;
      for (const chip of this.chips) {
        const j = Number(chip.dataset.at), value = values[j] - center;
        if (counted && !counted[j]) { chip.className = "token out"; continue; }
        const shown = Number.isFinite(value) && !(clear && Math.abs(value) < 2 * errors[j]);
        chip.className = shown ? `token ${value < 0 ? "neg" : "pos"}` : "token";
        chip.style.setProperty("--v", shown ? Math.min(Math.abs(value) / this.top, 1).toFixed(3) : "0");
        if (chip === this.here) chip.classList.add("here");
      }
    }

    lines(name, j) {
      const { values, errors } = this.numbers(name), [, length] = this.view.probes[name].shape;
      const s = Math.floor(j / length), i = j % length, text = this.texts[name], loss = this.losses[name];
      const row = this.choice.startsWith("row"), label = this.label();
      const lines = text.known ? [`“${onOneLine(text.at(s, i)).slice(0, 120)}”`] : [];
      const out = this.counted[name] && !this.counted[name][j];
      lines.push(out ? "excluded: weight 0" : `${row ? this.view.symbol : "coordinate"} = ${this.power ? `(${this.said(values, errors, j)}) · ${this.power}` : this.said(values, errors, j)}   (${label})`);
      if (loss) lines.push(`loss ${general(loss[j])}`);
      lines.push(`${name}, ${length > 1 ? `sequence ${s}, loss ${i}` : `sample ${s}`}`);
      return lines;
    }

    select(chip, scroll = true) {
      if (this.here) this.here.classList.remove("here");
      this.here = chip;
      chip.classList.add("here");
      if (scroll) chip.scrollIntoView({ block: "nearest" });
      this.find("detail").textContent = this.lines(this.name, Number(chip.dataset.at)).join(" · ");
    }

    show(chip) {
      tip.textContent = this.lines(this.name, Number(chip.dataset.at)).join("\n");
      tip.hidden = false;
      const place = chip.getBoundingClientRect(), size = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - size.width - 8))}px`;
      const below = place.bottom + 6;
      tip.style.top = `${below + size.height < innerHeight ? below : Math.max(4, place.top - size.height - 6)}px`;
    }

    extremes() {
      const order = this.find("order").value, many = Number(this.find("many").value);
      const listed = [];
      const usable = (error) => order === "value" || (error > 0 && Number.isFinite(error));
      const hasErrors = this.numbers(this.names[0]).errors;
      this.each((name, j, value, error) => {
        if (!hasErrors) listed.push([value, name, j]);
        else if (usable(error)) listed.push([order === "value" ? value : (value - this.view.center) / error, name, j]);
      });
      // Ties stay in the order of the text.
      this.find("of").textContent = this.label();
      this.list("largest", this.first(listed.slice().sort((a, b) => b[0] - a[0]), many));
      this.list("smallest", this.first(listed.sort((a, b) => a[0] - b[0]), many));
    }

    // The first so many; where asked for, no text twice.
    first(entries, many) {
      if (!this.find("once").checked) return entries.slice(0, many);
      const found = [], seen = new Set();
      for (const entry of entries) {
        const [, name, j] = entry, [, length] = this.view.probes[name].shape;
        const text = this.texts[name].at(Math.floor(j / length), j % length);
        if (found.length === many) break;
        if (!seen.has(text)) found.push(entry);
        seen.add(text);
      }
      return found;
    }

    list(kind, entries) {
      const table = this.find(kind), head = make("tr");
      const quantity = this.choice.startsWith("row") ? this.view.symbol : "coordinate";
      for (const title of [this.power ? `${quantity}, ${this.power}` : quantity, "where", "in context"]) head.append(make("th", title));
      table.tHead.replaceChildren(head);
      const rows = entries.map(([, name, j]) => {
        const { values, errors } = this.numbers(name), [, length] = this.view.probes[name].shape;
        const s = Math.floor(j / length), i = j % length, row = make("tr"), go = make("button", length > 1 ? `${name} ${s}:${i}` : `${name} ${s}`);
        go.type = "button";
        go.title = "show it in its place";
        go.addEventListener("click", () => this.go(name, j));
        const cell = make("td");
        cell.append(go);
        row.append(make("td", this.said(values, errors, j)), cell, this.context(name, s, i));
        return row;
      });
      table.tBodies[0].replaceChildren(...rows);
    }

    context(name, s, i) {
      const text = this.texts[name], [, length] = this.view.probes[name].shape, cell = make("td", "", "context");
      const join = (from, to) => {
        let said = "";
        for (let at = Math.max(from, -text.first); at < Math.min(to, length); at++) said += text.at(s, at);
        return onOneLine(said);
      };
      if (length > 1) cell.append(join(i - CONTEXT, i).slice(-40));
      cell.append(make("mark", onOneLine(text.at(s, i)).slice(0, 80).replace(/^ +$/, (spaces) => "␣".repeat(spaces.length))));
      if (length > 1) cell.append(join(i + 1, i + 1 + CONTEXT).slice(0, 40));
      return cell;
    }

    go(name, j) {
      const [, length] = this.view.probes[name].shape;
      this.open(name, Math.floor(j / length), j % length);
      const chip = this.chips.find((one) => Number(one.dataset.at) === j);
      this.find("text").focus({ preventScroll: true });
      this.find("title").scrollIntoView({ block: "start" });
      this.select(chip);
    }

    listen() {
      const on = (name, kind, act) => this.find(name).addEventListener(kind, act);
      on("choice", "change", (event) => { this.choice = event.target.value; this.paint(); if (this.here) this.select(this.here, false); });
      on("probe", "change", (event) => this.open(event.target.value, 0));
      on("clear", "change", () => this.paint());
      on("order", "change", () => this.extremes());
      on("many", "change", () => this.extremes());
      on("once", "change", () => this.extremes());
      on("before", "click", () => { this.screen--; this.draw(); });
      on("after", "click", () => { this.screen++; this.draw(); });
      on("sequence", "change", (event) => {
        const last = this.view.probes[this.name].shape[0] - 1;
        this.open(this.name, Math.min(Math.max(Math.trunc(Number(event.target.value)) || 0, 0), last));
      });
      const chipOf = (event) => event.target.closest && event.target.closest(".token[data-at]");
      on("text", "pointerover", (event) => { const chip = chipOf(event); if (chip) this.show(chip); else tip.hidden = true; });
      on("text", "pointerleave", () => { tip.hidden = true; });
      on("text", "scroll", () => { tip.hidden = true; });
      on("text", "click", (event) => { const chip = chipOf(event); if (chip) this.select(chip); });
      on("text", "keydown", (event) => {
        const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
        if (!(event.key in steps) || !this.chips.length) return;
        event.preventDefault();
        const at = this.here ? this.chips.indexOf(this.here) + steps[event.key] : 0;
        this.select(this.chips[Math.min(Math.max(at, 0), this.chips.length - 1)]);
      });
    }
  }

  for (const root of document.querySelectorAll("[data-view]")) new Viewer(root, data.views[Number(root.dataset.view)]);
  for (const box of document.querySelectorAll("input.by-row")) {
    const table = box.closest("section").querySelector("table.response-matrix");
    box.addEventListener("change", () => table.classList.toggle("own", box.checked));
  }
  document.documentElement.dataset.ready = "yes";
})();
