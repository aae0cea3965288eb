"use strict";
// What a chart shows at the pointer, and one tab stop for all tokens of a response. The page does
// without this script. Texts are set as text, never as markup.
(function () {
  const { names, charts } = JSON.parse(document.getElementById("data").textContent);
  const LEFT = 46, RIGHT = 352, TOP = 8, BOTTOM = 166; // of ppo_fast/report/charts.py

  function nearest(points, step) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle; else high = middle;
    }
    return step - points[low][0] < points[high][0] - step ? points[low] : points[high];
  }

  function follow(svg, lines) {
    const low = Number(svg.dataset.low), high = Number(svg.dataset.high);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", TOP);
    cursor.setAttribute("y2", BOTTOM);
    const readout = document.createElement("p");
    readout.className = "readout";
    function show(event) {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 360;
      const step = low + (x - LEFT) / (RIGHT - LEFT) * (high - low);
      const found = lines.map(line => [line.run, nearest(line.points, step)]);
      const at = found.map(one => one[1]).reduce(
        (a, b) => Math.abs(a[0] - step) <= Math.abs(b[0] - step) ? a : b)[0];
      const place = LEFT + (at - low) / (high - low) * (RIGHT - LEFT);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      readout.textContent = found.map(([run, [step, value]]) =>
        (names.length > 1 ? names[run] + ": " : "") + value + " at step " + step).join("\n");
      svg.append(cursor);
      svg.parentNode.append(readout);
    }
    function hide() { cursor.remove(); readout.remove(); }
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }

  for (const [name, lines] of Object.entries(charts)) {
    const svg = document.getElementById(name);
    if (svg && lines.length) follow(svg, lines);
  }

  for (const response of document.querySelectorAll(".tokens")) {
    const tokens = [...response.querySelectorAll(".t")];
    tokens.forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
    response.addEventListener("keydown", event => {
      const at = tokens.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (at < 0 || !tokens[to]) return;
      tokens[at].tabIndex = -1;
      tokens[to].tabIndex = 0;
      tokens[to].focus();
      event.preventDefault();
    });
  }
})();
