"""Style sheet of a report."""

from __future__ import annotations

PALETTE_SIZE = 8
"""Colours that lines of one chart may have: the classes `c0`, `c1`, ..."""

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f4;--card:#fff;--ink:#1b1f24;--soft:#5c6570;--rule:#e2e3de;
--accent:#2461c4;--before:#98a1ac;--good:#15803d;--bad:#c0342b;--goodbg:#e4f4ea;--badbg:#fbe8e6;
--warnbg:#fff3d1;--warn:#8a5700;--p0:#2461c4;--p1:#d2691e;--p2:#188a5b;--p3:#8e44ad;--p4:#c0342b;
--p5:#0e8a99;--p6:#8a6d1b;--p7:#6b7280}@media(prefers-color-scheme:dark){:root{--bg:#131619;
--card:#1c2024;--ink:#e7e9ec;--soft:#9ba5b0;--rule:#31373d;--accent:#7db0ff;--before:#7c8792;
--good:#4fc981;--bad:#ff8278;--goodbg:#17321f;--badbg:#3a1d1b;--warnbg:#372a0c;--warn:#f2c14e;
--p0:#7db0ff;--p1:#f5a05a;--p2:#56d09a;--p3:#cf96ea;--p4:#ff8278;--p5:#56ccd8;--p6:#dcbf62;
--p7:#a3acb7}}*{box-sizing:border-box}sup{line-height:0}a{color:var(--accent)}
h3 small{font-weight:400}.scroll+.note{margin-top:.7rem}header{padding-bottom:.7rem}
html{scroll-behavior:smooth;scroll-padding-top:3.5rem;
-webkit-text-size-adjust:100%}body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}main,header,nav ul,footer{max-width:1180px;margin:0 auto;
padding:0 clamp(1rem,3vw,2rem)}header{padding-top:clamp(1.5rem,4vw,3rem)}h1{font-size:clamp(1.6rem,
4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.2rem 0 .8rem}h2{font-size:1.4rem;
letter-spacing:-.01em;margin:3rem 0 .4rem}h3{font-size:1.05rem;margin:1.8rem 0 .6rem}h4{
font-size:.95rem;line-height:1.35;margin:0 0 .7rem;font-weight:600;overflow-wrap:anywhere}.kicker{
color:var(--soft);font-size:.8rem;letter-spacing:.08em;text-transform:uppercase}.lead{
font-size:1.1rem;max-width:46rem;margin:0 0 1.2rem}.note{color:var(--soft);font-size:.9rem;
max-width:46rem;margin:.2rem 0 1rem}.missing{border:1px dashed var(--before);border-radius:10px;
padding:.8rem 1rem;color:var(--soft)}nav{position:sticky;top:0;z-index:2;background:var(--bg);
border-bottom:1px solid var(--rule)}nav ul{display:flex;gap:1.2rem;overflow-x:auto;list-style:none;
padding-top:.6rem;padding-bottom:.6rem;font-size:.9rem;white-space:nowrap}nav a{color:var(--soft);
text-decoration:none}nav a:hover{color:var(--accent)}.cards{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w,320px)),1fr))}.card,figure.chart{
background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:1rem;margin:0;
min-width:0}.stat{--w:215px}.stat .big{font-size:1.55rem;font-weight:650;letter-spacing:-.02em;
line-height:1.3}.stat .was{color:var(--soft);font-weight:400}.chip{display:inline-block;
border-radius:99px;padding:.05rem .6rem;font-size:.85rem;background:var(--rule)}.chip.up{
background:var(--goodbg);color:var(--good)}.chip.down{background:var(--badbg);color:var(--bad)}
.soft{color:var(--soft)}.up{color:var(--good)}.down{color:var(--bad)}small{font-size:.8rem;
color:var(--soft)}.glance{display:grid;grid-template-columns:minmax(5.5rem,auto) 1fr;
gap:.3rem .8rem;align-items:center;font-size:.88rem}.glance .head{font-weight:650}.track{
position:relative;height:1.15rem;border-radius:4px;background:linear-gradient(90deg,var(--rule) 1px,
transparent 1px) 0 0/25% 100%,linear-gradient(var(--rule),var(--rule)) 0 50%/100% 1px no-repeat;
border-right:1px solid var(--rule)}.track i{position:absolute;display:block}.track .ci{height:4px;
border-radius:2px;opacity:.45}.track .dot{width:10px;height:10px;border-radius:50%;
margin:-5px 0 0 -5px}.track .b{background:var(--before)}.track .a{background:var(--accent)}
.track .ci.b{top:calc(50% - 5px)}.track .ci.a{top:calc(50% + 1px)}.track .dot{top:50%}.key{
display:flex;gap:1.2rem;font-size:.85rem;color:var(--soft);margin:.4rem 0 1rem;flex-wrap:wrap}
.key i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:.4rem}.key .b{
background:var(--before)}.key .a{background:var(--accent)}.scroll{overflow-x:auto;
border:1px solid var(--rule);border-radius:12px;background:var(--card)}table{
border-collapse:collapse;width:100%;font-size:.9rem}th,td{text-align:right;padding:.4rem .8rem;
border-bottom:1px solid var(--rule);white-space:nowrap}td small{display:block;line-height:1.2}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
thead th{color:var(--soft);font-weight:500;font-size:.82rem}tr:last-child td{border-bottom:0}
tr.group td{font-weight:650;padding-top:.9rem}tr.part td:first-child{padding-left:1.6rem}tr.head td{
font-weight:650}tr.head small{font-weight:400}.shots{display:grid;
grid-template-columns:3.4rem repeat(4,minmax(0,1fr));gap:.6rem;align-items:center;font-size:.82rem;
margin-top:.75rem}.shots figure,.pair figure,.pic{margin:0;position:relative}.px{display:block;
width:100%;aspect-ratio:1;image-rendering:pixelated;border-radius:4px;background:var(--rule)}
.ok .px{outline:3px solid var(--good)}.no .px{outline:3px solid var(--bad)}.mark{position:absolute;
right:-5px;bottom:-5px;width:1.1rem;height:1.1rem;border-radius:50%;color:var(--card);
font-size:.7rem;line-height:1.1rem;text-align:center;font-weight:700}.ok .mark{
background:var(--good)}.no .mark{background:var(--bad)}.empty{grid-column:2/-1;color:var(--soft);
font-style:italic}.pair{display:grid;grid-template-columns:3.4rem repeat(4,minmax(0,1fr));gap:.5rem;
align-items:center;font-size:.82rem}.pair figcaption{color:var(--soft);font-size:.75rem;
text-align:center}.ask{display:grid;grid-template-columns:84px 1fr;gap:.9rem;margin-bottom:.6rem}
.ask h4{margin:0 0 .3rem}.sides{display:grid;grid-template-columns:1fr 1fr;gap:.9rem;
font-size:.84rem}.sides ul{list-style:none;margin:.2rem 0 0;padding:0}.sides li{
padding:.15rem 0 .15rem 1.3rem;position:relative;overflow-wrap:anywhere;max-height:11rem;
overflow-y:auto;line-height:1.35}.sides li::before{position:absolute;left:0;font-weight:700}
.sides li.ok::before{content:"\\2713";color:var(--good)}.sides li.no::before{content:"\\2717";
color:var(--bad)}.sides li.greedy{border-top:1px solid var(--rule);margin-top:.25rem;
padding-top:.35rem}figure.chart{padding:.8rem .8rem .6rem}figcaption strong{font-size:.9rem}
figcaption{color:var(--soft);font-size:.8rem}figcaption strong{color:var(--ink);font-weight:600}svg{
display:block;width:100%;height:auto;overflow:visible}svg text{font-size:11px;fill:var(--soft)}
svg .rule{stroke:var(--rule)}polyline{fill:none;stroke:var(--c);stroke-linejoin:round}polyline.raw{
opacity:.3;stroke-width:1}polyline.mean{stroke-width:2}circle{fill:var(--c)}.legend{list-style:none;
display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.82rem;
color:var(--soft)}.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;
background:var(--c);margin-right:.4rem;vertical-align:middle}.legend b{color:var(--ink);
font-weight:600}.alarm,.calm{border-radius:12px;padding:.8rem 1.1rem;margin:.6rem 0 1rem}.alarm{
background:var(--warnbg);color:var(--warn);border:1px solid currentColor}.alarm ul{margin:.3rem 0 0;
padding-left:1.2rem}.calm{background:var(--goodbg);color:var(--good)}.bars{display:grid;
grid-template-columns:minmax(4rem,auto) 1fr auto;gap:.25rem .7rem;align-items:center;
font-size:.84rem}.bars .bar{display:grid;gap:2px}.bars .bar i{display:block;height:7px;
border-radius:2px;min-width:1px}.bars .b{background:var(--before)}.bars .a{background:var(--accent)}
.bars small{text-align:right;white-space:nowrap}
details{background:var(--card);border:1px solid var(--rule);
border-radius:12px;padding:.7rem 1rem;margin-top:1rem}summary{cursor:pointer;font-weight:600}
details .cards{margin-top:1rem}pre{overflow-x:auto;font:.84rem/1.5 ui-monospace,SFMono-Regular,
Menlo,Consolas,monospace;background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:.8rem 1rem}details pre{border:0;padding:0}footer{color:var(--soft);font-size:.85rem;
padding-top:2rem;padding-bottom:3rem}@media(max-width:560px){.sides{gap:.6rem}.card{padding:.8rem}
th,td{padding:.4rem .55rem}.shots,.pair{grid-template-columns:3rem repeat(4,minmax(0,1fr))}}
""" + ''.join(f'.c{i}{{--c:var(--p{i})}}' for i in range(PALETTE_SIZE))
