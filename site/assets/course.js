// What the course's pages do in the browser: ticks, diagrams, the glossary's words, the symptom book's search.
// No request leaves the site, and all of it works from a folder (file://) as well.
"use strict";

const ZH = document.documentElement.lang.startsWith("zh");
const say = (english, chinese) => (ZH ? chinese : english);
const SHARED = new URL(ZH ? "../../assets/" : "./", document.currentScript.src); // what both languages use lies once
const article = document.querySelector("article");

// --- progress: ticks in localStorage, the same for both languages ---

const KEY = "deepspeed-course";
const ticks = () => JSON.parse(localStorage.getItem(KEY) || "{}");

function showTicks() {
    const done = ticks();
    for (const box of document.querySelectorAll("[data-tick]")) box.checked = box.dataset.tick in done;
    for (const link of document.querySelectorAll(".md-nav__link[href$='notes.html']"))
        link.classList.toggle("ticked", link.pathname.split("/").at(-2) in done);
    const counter = document.getElementById("ticked");
    if (counter) {
        const all = [...document.querySelectorAll(".cards [data-tick]")];
        const days = all.filter((box) => box.checked).length;
        const exercises = Object.keys(done).filter((name) => name.includes("/")).length;
        counter.value = say(
            `${days} of ${all.length} days, ${exercises} exercises`,
            `${all.length} 天中的 ${days} 天，${exercises} 道练习`,
        );
    }
}

function addExerciseTicks() {
    const day = document.querySelector(".course-bar [data-tick]")?.dataset.tick;
    let number = 0;
    for (let node = document.getElementById("exercises"); day && (node = node.nextElementSibling) && node.tagName !== "H2"; )
        for (const item of node.matches("ol") ? node.children : []) {
            const box = document.createElement("input");
            Object.assign(box, { type: "checkbox", ariaLabel: say("Exercise done: ", "练习已完成：") + ++number });
            box.dataset.tick = `${day}/${number}`;
            (item.querySelector("p") || item).prepend(box, " ");
        }
}

function exportTicks() {
    const file = new Blob([JSON.stringify(ticks(), null, 2)], { type: "application/json" });
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: `${KEY}.json` });
    link.click();
    URL.revokeObjectURL(link.href);
}

async function importTicks({ target }) {
    const [file] = target.files;
    try {
        const more = JSON.parse(await file.text());
        if (Object.values(more).some((day) => !/^\d{4}-\d\d-\d\d$/.test(day))) throw new SyntaxError("no dates");
        localStorage.setItem(KEY, JSON.stringify({ ...ticks(), ...more }));
        showTicks();
    } catch (error) {
        document.getElementById("ticked").value = say(
            `${file.name} is no export of this page: ${error.message}`,
            `${file.name} 不是本页导出的文件：${error.message}`,
        );
    }
}

addExerciseTicks();
showTicks();
document.addEventListener("change", ({ target }) => {
    if (!target.dataset.tick) return;
    const done = ticks();
    if (target.checked) done[target.dataset.tick] = new Date().toISOString().slice(0, 10);
    else delete done[target.dataset.tick];
    localStorage.setItem(KEY, JSON.stringify(done));
    showTicks();
});
document.getElementById("export")?.addEventListener("click", exportTicks);
document.getElementById("import")?.addEventListener("change", importTicks);

// --- what is wider than a phone scrolls, with the keyboard as well ---

function reachWithKeys() {
    for (const wide of article.querySelectorAll("pre > code, pre.diagram, .md-typeset__scrollwrap"))
        if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
        else wide.removeAttribute("tabindex");
}

for (const event of ["load", "resize"]) window.addEventListener(event, reachWithKeys);
article.addEventListener("toggle", reachWithKeys, true);

// --- the language switch lands on the same heading ---

document.querySelector(".course-language")?.addEventListener("click", (event) => {
    event.currentTarget.hash = location.hash;
});

// --- what only some pages need is loaded by them ---

const loaded = {};

function loadScript(name) {
    loaded[name] ??= new Promise((resolve, reject) => {
        const script = Object.assign(document.createElement("script"), { src: new URL(name, SHARED) });
        script.addEventListener("load", resolve);
        script.addEventListener("error", reject);
        document.head.append(script);
    });
    return loaded[name];
}

// --- formulas ---

async function showFormulas(formulas) {
    const style = { rel: "stylesheet", href: new URL("katex/katex.css", SHARED) };
    document.head.append(Object.assign(document.createElement("link"), style));
    await loadScript("katex/katex.js");
    for (const formula of formulas) {
        const source = formula.textContent.trim().replace(/^\\[[(]|\\[\])]$/g, "");
        katex.render(source, formula, { displayMode: formula.tagName === "DIV" });
    }
}

const formulas = document.querySelectorAll(".arithmatex");
if (formulas.length) showFormulas(formulas);

// --- diagrams: mermaid is loaded when one comes into view, and draws again when the theme changes ---

const diagrams = [...document.querySelectorAll("pre.diagram")];
const isDark = () => document.body.dataset.mdColorScheme === "slate";
async function draw(pre) {
    await loadScript("mermaid.js");
    pre.dataset.source ??= pre.textContent;
    const { fontFamily } = getComputedStyle(document.body);
    const theme = isDark() ? "dark" : "neutral";
    const themeVariables = isDark() ? { edgeLabelBackground: "#222" } : {}; // its own grey is too light to read on
    mermaid.initialize({ startOnLoad: false, theme, themeVariables, fontFamily });
    const { svg } = await mermaid.render(`diagram-${diagrams.indexOf(pre)}`, pre.dataset.source);
    pre.innerHTML = svg;
    const words = pre.dataset.source.match(/"[^"]+"/g) || [];
    const picture = pre.firstElementChild;
    picture.ariaHidden = "true";
    picture.style.minWidth = `min(${picture.style.maxWidth}, 34rem)`; // on a phone it scrolls and can be read
    pre.role = "img";
    pre.ariaLabel = say("Diagram: ", "示意图：") + words.join(", ").replace(/"|<br\/?>/g, " ");
    pre.classList.add("drawn");
    reachWithKeys();
}

let drawing = Promise.resolve(); // one after the other: mermaid keeps one configuration for all
const drawSoon = (pre) => (drawing = drawing.then(() => draw(pre)));
const whenSeen = new IntersectionObserver(
    (entries) => {
        for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
            whenSeen.unobserve(target);
            drawSoon(target);
        }
    },
    { rootMargin: "600px" },
);
diagrams.forEach((pre) => whenSeen.observe(pre));
new MutationObserver(() => diagrams.filter((pre) => pre.dataset.source).forEach(drawSoon)).observe(document.body, {
    attributeFilter: ["data-md-color-scheme"],
});
window.addEventListener("beforeprint", () => diagrams.filter((pre) => !pre.dataset.source).forEach(drawSoon));

// --- the glossary's words: the first mention on a page leads to the glossary and says what it means ---

function linkTerms() {
    const home = document.querySelector(".md-header__button.md-logo").href.replace(/index\.html$/, "");
    const left = new Map(GLOSSARY.flatMap((entry) => entry.words.map((word) => [word.toLowerCase(), entry])));
    const escaped = [...left.keys()].map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const longest = escaped.sort((a, b) => b.length - a.length).join("|");
    const pattern = new RegExp(`(?<![\\w-])(?:${longest})(?![\\w-])`, "i");
    const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT, (node) =>
        node.parentElement.closest("p, li") && !node.parentElement.closest("a, code, pre, sub, .course-bar, summary, label")
            ? NodeFilter.FILTER_ACCEPT
            : NodeFilter.FILTER_REJECT,
    );
    const linked = new Set();
    for (let node = texts.nextNode(); node; node = texts.nextNode()) {
        for (let found; (found = pattern.exec(node.data)); ) {
            node = node.splitText(found.index);
            const rest = node.splitText(found[0].length);
            const entry = left.get(found[0].toLowerCase());
            if (!linked.has(entry.id)) {
                const link = Object.assign(document.createElement("a"), {
                    className: "term",
                    href: `${home}glossary.html#${entry.id}`,
                    title: entry.meaning,
                });
                node.replaceWith(link);
                link.append(node);
                linked.add(entry.id);
            }
            node = texts.currentNode = rest;
        }
    }
}

if (document.querySelector(".course-bar [data-tick]")) linkTerms();

// --- the symptom book: paste an error, the rows that fit stay (day13/symptoms.py, search) ---

const wordsOf = (text) => new Set(text.toLowerCase().match(/[a-z_]{2,}|[\u4e00-\u9fff]/g) || []);

function symptomRows() {
    return [...article.querySelectorAll("tbody tr")].map((row) => {
        const [message, cause] = [row.querySelector("code").textContent, row.cells[1].textContent];
        const parts = message.split("…").map((part) => part.trim().replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
        return {
            row,
            message,
            pattern: new RegExp(parts.join("[^]*?").replace(/\s+/g, "\\s+")),
            bag: wordsOf(`${message} ${row.querySelector("a[id]").id} ${cause}`),
        };
    });
}

/** Rows with a score, best first: 1 when the words are the book's, else shared words, a rare one counting for more. */
function searchSymptoms(rows, text) {
    const weight = (word) => Math.log(1 + rows.length / rows.filter(({ bag }) => bag.has(word)).length);
    const asked = wordsOf(text);
    const sum = (words) => words.reduce((total, word) => total + weight(word), 0);
    const most = sum([...asked].filter((word) => rows.some(({ bag }) => bag.has(word)))) || 1;
    return rows
        .map((entry) => ({
            ...entry,
            score: entry.pattern.test(text) ? 1 : (0.99 * sum([...entry.bag].filter((word) => asked.has(word)))) / most,
        }))
        .sort((a, b) => b.score - a.score || b.message.length - a.message.length);
}

function addSymptomSearch() {
    const rows = symptomRows();
    const box = document.createElement("div");
    box.className = "symptom-search";
    box.innerHTML = `<label for="symptom">${say("Paste an error, or some words of it", "粘贴报错，或其中几个词")}</label>
        <textarea id="symptom" rows="2" spellcheck="false"></textarea><p role="status"></p>`;
    article.querySelector("h2").before(box);
    box.querySelector("textarea").addEventListener("input", ({ target }) => {
        const found = searchSymptoms(rows, target.value).filter(({ score }) => score > 0.3).slice(0, 5);
        const kept = new Set(found.map(({ row }) => row));
        const all = !target.value.trim();
        rows.forEach(({ row }) => row.classList.toggle("hidden", !all && !kept.has(row)));
        for (const table of article.querySelectorAll("table")) {
            const empty = ![...table.tBodies[0].rows].some((row) => !row.classList.contains("hidden"));
            const block = table.closest(".md-typeset__scrollwrap") || table;
            block.classList.toggle("hidden", empty);
            block.previousElementSibling?.classList.toggle("hidden", empty);
        }
        const status = box.querySelector("[role=status]");
        status.textContent = all ? "" : say(`${found.length} of ${rows.length} fit`, `${rows.length} 条中有 ${found.length} 条符合`);
        if (found.length) status.append(": ", Object.assign(document.createElement("code"), { textContent: found[0].message }));
    });
}

if (location.pathname.endsWith("day13/symptoms.html")) addSymptomSearch();
