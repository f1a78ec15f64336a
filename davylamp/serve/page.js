"use strict";
// The page is whole without this: it only fetches itself again and swaps the numbers in, which is calmer than a reload.
(function () {
  async function again() {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) {
        const next = new DOMParser().parseFromString(await answer.text(), "text/html");
        document.querySelector("main").replaceWith(next.querySelector("main"));
        document.querySelector("header").replaceWith(next.querySelector("header"));
      }
      document.body.classList.toggle("stale", !answer.ok);
    } catch (error) {
      document.body.classList.add("stale");
    }
  }
  setInterval(again, 2000);
})();
