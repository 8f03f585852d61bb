// The player of a tokenizer's report: one clip in all its versions, a slider over token counts.
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

  showPlaying();
  open(0);
  drawAlways(() => {
    if (clock.playing) scrubber.value = frameOf(clip);
    byId("frame").textContent = `${frameOf(clip) + 1} / ${clip.frames}`;
  });
};
if (clips.length) setUpPlayer();
