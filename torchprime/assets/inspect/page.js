// Shows what is known of a token in the bar at the bottom; without this, its title does.
(() => {
  const bar = document.getElementById("bar");
  let chosen = null;
  const show = (token) => {
    if (token.title) {
      token.dataset.told = token.title;
      token.removeAttribute("title");
    }
    bar.replaceChildren(
      ...token.dataset.told.split("\n").map((line) => {
        const part = document.createElement("span");
        part.textContent = line;
        return part;
      })
    );
    bar.hidden = false;
    if (chosen) chosen.classList.remove("chosen");
    chosen = token;
    token.classList.add("chosen");
  };
  const tokenAt = (event) =>
    event.target instanceof Element ? event.target.closest(".tokens b") : null;
  document.addEventListener("pointerover", (event) => {
    const token = tokenAt(event);
    if (token) show(token);
  });
  document.addEventListener("click", (event) => {
    const token = tokenAt(event);
    if (token) show(token);
    else if (!bar.contains(event.target)) {
      bar.hidden = true;
      if (chosen) chosen.classList.remove("chosen");
    }
  });
})();
