"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const clips = JSON.parse(byId("clip-data").textContent);

  // One clock drives every canvas, so versions never drift apart and switching one keeps its time.
  const clock = {
    playing: !matchMedia("(prefers-reduced-motion: reduce)").matches,
    seconds: 0, rate: 1, last: null,
    tick(now) {
      if (this.playing && this.last !== null) this.seconds += this.rate * Math.min((now - this.last) / 1000, 0.25);
      this.last = now;
    },
  };
  const frameOf = (clip) => Math.floor(clock.seconds * clip.fps + 1e-6) % clip.frames;

  const sheets = new Map();
  const sheet = (source) => {
    if (!sheets.has(source)) {
      const image = new Image();
      image.src = source;
      sheets.set(source, image);
    }
    return sheets.get(source);
  };
  const ready = (image) => image.complete && image.naturalWidth > 0;
  const drawFrame = (context, image, clip, frame) => {
    const x = (frame % clip.columns) * clip.width, y = Math.floor(frame / clip.columns) * clip.height;
    context.drawImage(image, x, y, clip.width, clip.height, 0, 0, clip.width, clip.height);
  };

  // A painted canvas knows where its pixels come from; it is redrawn only when its source or its frame changes.
  const visible = new Map();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) visible.set(entry.target, entry.isIntersecting);
  }, { rootMargin: "200px" });
  const painters = new Map();
  const paint = (canvas, clip, sources, how) => {
    if (canvas.width !== clip.width || canvas.height !== clip.height) { canvas.width = clip.width; canvas.height = clip.height; }
    if (!painters.has(canvas)) watcher.observe(canvas);
    delete canvas.dataset.frame;  // says which frame is on the canvas: none of this source yet
    painters.set(canvas, { clip, sources, how, drawn: "" });
  };
  const forget = (root) => root.querySelectorAll("canvas").forEach((c) => { painters.delete(c); visible.delete(c); watcher.unobserve(c); });
  const plain = (context, [image], clip, frame) => drawFrame(context, image, clip, frame);
  const scratch = document.createElement("canvas");
  const difference = (context, [first, second], clip, frame) => {
    scratch.width = clip.width; scratch.height = clip.height;
    const other = scratch.getContext("2d", { willReadFrequently: true });
    drawFrame(other, first, clip, frame);
    const a = other.getImageData(0, 0, clip.width, clip.height);
    drawFrame(other, second, clip, frame);
    const b = other.getImageData(0, 0, clip.width, clip.height);
    for (let i = 0; i < a.data.length; i += 1) if (i % 4 < 3) a.data[i] = Math.min(255, 4 * Math.abs(a.data[i] - b.data[i]));
    context.putImageData(a, 0, 0);
  };

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const decibels = (value) => (value === null || value === undefined ? "\u2013" : value.toFixed(2) + " dB");
  const named = (version) => (version.tokens === null ? version.label : version.tokens + (version.tokens === 1 ? " token" : " tokens"));
  const find = (clip, label) => clip.versions.find((v) => v.label === label);

  const setUpPlayer = () => {
    // The slider's stops are the token counts of all clips; other versions (controls, codecs) are buttons.
    const stops = [...new Set(clips.flatMap((c) => c.versions.filter((v) => v.tokens !== null).map((v) => v.tokens)))].sort((a, b) => a - b);
    const others = [...new Set(clips.flatMap((c) => c.versions.filter((v) => v.tokens === null).map((v) => v.label)))];
    const slider = byId("tokens"), scrubber = byId("time"), play = byId("play"), player = byId("player");
    let clip = clips[0], label = stops.length ? String(stops[Math.floor(stops.length / 2)]) : others[0];

    slider.max = Math.max(0, stops.length - 1);
    slider.disabled = stops.length < 2;
    const ticks = byId("ticks");
    stops.forEach((count) => ticks.append(element("span", "", String(count))));
    const chips = byId("others");
    for (const name of others) {
      const chip = element("button", "", name);
      chip.type = "button";
      chip.addEventListener("click", () => show(name));
      chips.append(chip);
    }
    byId("others-row").hidden = others.length === 0;

    const showLabel = () => {
      const version = find(clip, label);
      const stop = stops.indexOf(Number(label));
      const isCount = stop >= 0 && String(stops[stop]) === label;
      if (isCount) slider.value = stop;
      [...ticks.children].forEach((tick, i) => tick.classList.toggle("on", isCount && i === stop));
      [...chips.children].forEach((chip) => chip.setAttribute("aria-pressed", String(chip.textContent === label)));
      const words = version ? `${named(version)}, ${decibels(version.psnr)}` : `${label}: not kept for this clip`;
      byId("readout").textContent = words;
      slider.setAttribute("aria-valuetext", words);
      byId("shown-name").textContent = version ? named(version) : label;
      byId("shown-score").textContent = version ? decibels(version.psnr) : "";
      const source = version ? version.source : clip.original;
      byId("reconstruction").dataset.label = label;
      paint(byId("reconstruction"), clip, [source], plain);
      byId("reconstruction").style.visibility = version ? "visible" : "hidden";
      byId("difference-panel").hidden = !byId("show-difference").checked;
      if (byId("show-difference").checked) paint(byId("difference"), clip, [clip.original, source], difference);
      [...byId("multiples").children].forEach((item) => item.setAttribute("aria-pressed", String(item.dataset.label === label)));
      for (const card of document.querySelectorAll(".gallery button")) {
        const its = clips[Number(card.dataset.clip)], shown = find(its, label);
        paint(card.querySelectorAll("canvas")[1], its, [shown ? shown.source : its.original], plain);
        card.querySelectorAll("canvas")[1].style.visibility = shown ? "visible" : "hidden";
        card.querySelector(".score").textContent = shown ? `${named(shown)}: ${decibels(shown.psnr)}` : `${label}: not kept`;
      }
    };
    const show = (next) => { label = next; showLabel(); };

    const open = (index) => {
      clip = clips[index];
      byId("clip").value = String(index);
      scrubber.max = clip.frames - 1;
      byId("caption").firstChild.textContent = clip.caption || "(no caption)";
      byId("clip-key").textContent = [clip.key, `${clip.width} \u00d7 ${clip.height}`, `${clip.frames} frames at ${clip.fps} fps`, ...clip.tags].join(" \u00b7 ");
      paint(byId("original"), clip, [clip.original], plain);
      const grid = byId("multiples");
      forget(grid);
      grid.replaceChildren();
      const all = [{ label: null, tokens: null, psnr: null, source: clip.original }, ...clip.versions];
      for (const version of all) {
        const item = element("button"), figure = element("span", "version"), words = element("span", "under"), canvas = element("canvas");
        item.type = "button";
        item.dataset.label = version.label === null ? "" : version.label;
        if (version.label === null) item.disabled = true;
        words.append(element("span", "", version.label === null ? "original" : named(version)), element("span", "", version.label === null ? "" : decibels(version.psnr)));
        figure.append(canvas, words);
        item.append(figure);
        item.addEventListener("click", () => version.label !== null && show(version.label));
        paint(canvas, clip, [version.source], plain);
        grid.append(item);
      }
      for (const card of document.querySelectorAll(".gallery button")) card.setAttribute("aria-pressed", String(Number(card.dataset.clip) === index));
      showLabel();
    };

    const chooser = byId("clip");
    clips.forEach((c, i) => {
      const option = element("option", "", c.caption ? `${c.key}: ${c.caption}`.slice(0, 90) : c.key);
      option.value = String(i);
      chooser.append(option);
    });
    for (const card of document.querySelectorAll(".gallery button")) {
      const its = clips[Number(card.dataset.clip)];
      paint(card.querySelector("canvas"), its, [its.original], plain);
      card.addEventListener("click", () => { open(Number(card.dataset.clip)); player.scrollIntoView(); });
    }

    const showPlaying = () => {
      play.textContent = clock.playing ? "Pause" : "Play";
    };
    const toggle = () => { clock.playing = !clock.playing; showPlaying(); };
    play.addEventListener("click", toggle);
    slider.addEventListener("input", () => show(String(stops[Number(slider.value)])));
    scrubber.addEventListener("input", () => {
      clock.playing = false;
      clock.seconds = Number(scrubber.value) / clip.fps;
      showPlaying();
    });
    chooser.addEventListener("change", () => open(Number(chooser.value)));
    byId("rate").addEventListener("change", (event) => { clock.rate = Number(event.target.value); });
    byId("smooth").addEventListener("change", (event) => document.body.classList.toggle("smooth", event.target.checked));
    byId("show-difference").addEventListener("change", showLabel);
    player.addEventListener("keydown", (event) => {
      if (event.key === " " && !["BUTTON", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox") { event.preventDefault(); toggle(); }
    });

    const loop = (now) => {
      clock.tick(now);
      for (const [canvas, work] of painters) {
        if (!visible.get(canvas)) continue;
        const frame = frameOf(work.clip), images = work.sources.map(sheet), key = `${frame}`;
        if (work.drawn === key || !images.every(ready)) continue;
        work.how(canvas.getContext("2d"), images, work.clip, frame);
        canvas.dataset.frame = key;
        work.drawn = key;
      }
      if (clock.playing) scrubber.value = frameOf(clip);
      byId("frame").textContent = `${frameOf(clip) + 1} / ${clip.frames}`;
      requestAnimationFrame(loop);
    };
    showPlaying();
    open(0);
    requestAnimationFrame(loop);
  };
  if (clips.length) setUpPlayer();

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const charts = button.closest("section").querySelectorAll("svg.chart .series");
      charts.forEach((group) => { if (group.dataset.series === button.dataset.series) group.classList.toggle("off", !on); });
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.value;
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === "" || y === "") return (x === "") - (y === "");  // undefined values stay last
          const [p, q] = [Number(x), Number(y)];
          return direction * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q);
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }
})();
