"""The style sheet of the report: two themes, system fonts, nothing fetched."""

STYLE = """
:root{color-scheme:light dark;
--page:#f6f7f9;--card:#ffffff;--ink:#1b1f27;--soft:#5b6472;--rule:#dfe3ea;--accent:#2f5fd0;--track:#e9edf4;
--good:#1f8a4c;--warn:#b26a00;--bad:#c0392b;
--c0:#2f5fd0;--c1:#d9622b;--c2:#1f8a4c;--c3:#a03fb5;--c4:#c79a00;--c5:#0e8fa3;--c6:#c2356b;--c7:#7a8290}
@media (prefers-color-scheme:dark){:root{
--page:#12151b;--card:#1a1f28;--ink:#e7eaf0;--soft:#9aa4b5;--rule:#2c3442;--accent:#7ea6ff;--track:#262e3b;
--good:#4cc38a;--warn:#f0b04d;--bad:#ff7b6b;
--c0:#7ea6ff;--c1:#ff9a66;--c2:#4cc38a;--c3:#d68cf0;--c4:#f0cf4d;--c5:#4fd0e3;--c6:#ff7fb0;--c7:#9aa4b5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:21px;margin:44px 0 12px;padding-top:12px;border-top:1px solid var(--rule);overflow-wrap:anywhere}
h3{font-size:15px;margin:0 0 8px}
h3.wide{font-size:17px;margin:28px 0 10px}
p{margin:0 0 10px}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
.soft,figcaption,.facts{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:14px 0 22px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:14px;margin:0 0 16px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;min-width:0}
.cards .card>a{font-weight:600}
.big{display:flex;gap:22px;margin:6px 0 2px}
.big div{font-size:27px;font-weight:650;line-height:1.15;font-variant-numeric:tabular-nums}
.big span{display:block;font-size:12px;font-weight:400;color:var(--soft)}
.facts{font-size:13px}
.badge{display:inline-block;font-size:12px;line-height:1;padding:4px 8px;border-radius:99px;margin-left:8px;
background:var(--track);color:var(--soft);vertical-align:2px;white-space:nowrap}
.badge.good{color:var(--good)}.badge.warn{color:var(--warn)}.badge.bad{color:var(--bad)}
.gain{border-left:4px solid var(--good)}
.gain.none{border-left-color:var(--warn)}
.missing{color:var(--warn);margin:0 0 8px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th{font-weight:600;font-size:13px;color:var(--soft)}
th:first-child,td:first-child,.text{text-align:left}
th:first-child,td:first-child{padding-left:0}
tbody tr:last-child td{border-bottom:0}
td.name{max-width:260px;overflow:hidden;text-overflow:ellipsis}
td.bar{width:34%;min-width:110px}
.track{position:relative;height:9px;border-radius:5px;background:var(--track);overflow:hidden}
.track i{position:absolute;left:0;top:0;bottom:0;border-radius:5px;background:var(--c0)}
.track i.soft{background:var(--c0);opacity:.35}
svg{display:block;width:100%;max-width:480px;height:auto;margin:0 auto}
svg text{font-size:12px;fill:var(--soft)}
svg .label{fill:var(--ink)}
svg .grid{stroke:var(--rule);fill:none}
svg .axis{stroke:var(--soft);fill:none}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .faint{stroke-width:1;opacity:.35}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 16px;margin:8px 0 0;padding:0;
font-size:13px;color:var(--soft)}
.legend li{max-width:100%;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:14px;margin:10px 0 4px;
align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px}
figcaption{font-size:13px;margin-top:6px}
figcaption b{color:var(--ink)}
.pair{display:flex;gap:8px;justify-content:center}
.pair img{max-width:calc(50% - 4px);max-height:300px;width:auto;height:auto;border-radius:6px}
details{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 16px;margin:12px 0}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;margin:10px 0 0}
footer{margin-top:40px;color:var(--soft);font-size:13px}
@media (max-width:520px){main{padding:18px 12px 40px}h1{font-size:23px}.card{padding:12px}.big div{font-size:23px}
th,td{padding:5px 7px}.wide-only{display:none}
.pair{flex-direction:column;align-items:center}.pair img{max-width:100%}}
@media print{details{break-inside:avoid}.card,figure{break-inside:avoid}}
"""
