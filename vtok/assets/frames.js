// Clips as sprites on canvases: shared by every report.
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

// Every canvas in sight shows the frame of the clock; `beside` is what a page does at each frame.
const drawAlways = (beside) => {
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
    beside();
    requestAnimationFrame(loop);
  };
  requestAnimationFrame(loop);
};
