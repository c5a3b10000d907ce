// The page of the interfaces, made of /openapi.json.

const make = (name, text = "", ...children) => {
  const element = document.createElement(name);
  element.textContent = text;
  element.append(...children);
  return element;
};

const spec = await (await fetch("/openapi.json")).json();
const resolved = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema) || {};
const kind = (schema) => schema.type || (schema.anyOf || []).map(kind).filter((each) => each !== "null").join(" or ") || (schema.$ref || "").split("/").pop();

function table(heads, rows) {
  return make("table", "", make("tr", "", ...heads.map((head) => make("th", head))), ...rows.map((row) => make("tr", "", ...row.map((cell) => make("td", String(cell ?? ""))))));
}

function inside(path, method, operation) {
  const box = Object.assign(document.createElement("div"), { className: "inside" });
  const fields = (operation.parameters || []).map((each) => [each.name, `${each.in}, ${kind(each.schema)}`, each.schema.default, each.description || each.schema.description || ""]);
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content || {})) {
    for (const [name, field] of Object.entries(resolved(schema).properties || {})) fields.push([name, `${type.split("/").pop()}, ${kind(field)}`, field.default, field.description || ""]);
  }
  if (fields.length) box.append(table(["Field", "Where and what", "Default", ""], fields));
  box.append(table(["Status", ""], Object.entries(operation.responses).map(([status, each]) => [status, each.description])));
  if (method === "post") box.append(make("pre", path === "/v1/meshes" ? `curl -F image=@chair.png ${location.origin}${path}` : `curl -H 'Content-Type: application/json' -d '{"image": "'$(base64 -w0 chair.png)'"}' ${location.origin}${path}`));
  return box;
}

const groups = {};
for (const [path, methods] of Object.entries(spec.paths)) for (const [method, operation] of Object.entries(methods)) (groups[operation.tags?.[0] || "other"] ??= []).push([path, method, operation]);
for (const [name, operations] of Object.entries(groups)) {
  document.getElementById("interfaces").append(make("h2", name), ...operations.map(([path, method, operation]) => make("details", "", make("summary", "", make("b", method.toUpperCase()), make("code", path), make("span", operation.description || operation.summary || "")), inside(path, method, operation))));
}
