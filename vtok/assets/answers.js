// The clips of a projector's report play beside what was answered; one button stops and starts them all.
for (const canvas of document.querySelectorAll(".asked canvas")) {
  const clip = clips[Number(canvas.dataset.clip)];
  paint(canvas, clip, [clip.original], plain);
}
const play = byId("play");
if (play) {
  const showPlaying = () => { play.textContent = clock.playing ? "Pause" : "Play"; };
  play.addEventListener("click", () => { clock.playing = !clock.playing; showPlaying(); });
  showPlaying();
  drawAlways(() => {});
}
