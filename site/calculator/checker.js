// The part of config/check.py that a schema can do, in the browser: ajv with config/ds_config.schema.json, and what
// somebody who wrote an unknown key meant, from the checker's own table. The batch equation besides.

// Whether a key is near enough to be a slip of the pen: edit distance, at most a third of its length.
function distance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
    }
    row = next;
  }
  return row[b.length];
}

function nearest(key, names) {
  const scored = names.map((name) => [distance(key.toLowerCase(), name), name]).sort((x, y) => x[0] - y[0]);
  return scored.length && scored[0][0] <= Math.max(1, key.length / 3) ? scored[0][1] : null;
}

const at = (value, path) => path.reduce((found, key) => found?.[key], value);

// The names that the schema has at a path.
function namesAt(schema, path) {
  let found = schema;
  for (const key of path) {
    const choices = [found, ...(found?.anyOf ?? []), ...(found?.oneOf ?? [])];
    found = choices.map((choice) => choice?.properties?.[key]).find(Boolean);
    if (found?.$ref) found = at(schema, found.$ref.slice(2).split("/"));
  }
  const choices = [found, ...(found?.anyOf ?? []), ...(found?.oneOf ?? [])];
  return choices.flatMap((choice) => Object.keys(choice?.properties ?? {}));
}

// [{path, message, cure}] of a DeepSpeed JSON. `wrong`: {section: {key: what to write}}; `ranks`: of the form.
function check(text, validate, schema, wrong, ranks) {
  let config;
  try {
    config = JSON.parse(text);
  } catch (error) {
    return [{ path: "", message: `this is no JSON: ${error.message}`, cure: "" }];
  }
  if (config === null || typeof config !== "object" || Array.isArray(config)) {
    return [{ path: "", message: "a DeepSpeed config is an object: { ... }", cure: "" }];
  }
  const found = new Map();
  validate(config);
  for (const error of validate.errors ?? []) {
    const path = error.instancePath.split("/").slice(1);
    if (error.keyword === "additionalProperties") {
      const key = error.params.additionalProperty, near = nearest(key, namesAt(schema, path));
      const known = wrong[path.join(".")]?.[key];
      found.set([...path, key].join("."), { message: "DeepSpeed has no such key", cure: known ?? (near && `${near}?`) ?? "" });
    } else if (!["anyOf", "oneOf", "if"].includes(error.keyword) && !found.has(path.join("."))) {
      const value = JSON.stringify(at(config, path))?.slice(0, 60);
      const cure = error.params?.allowedValues ? error.params.allowedValues.join(", ") : "";
      found.set(path.join("."), { message: `${value}: ${error.message}`, cure });
    }
  }
  const list = [...found].map(([path, said]) => ({ path, ...said }));
  return [...list, ...batch(config, ranks)];
}

function batch(config, ranks) {
  const [total, micro] = [config.train_batch_size, config.train_micro_batch_size_per_gpu];
  const steps = config.gradient_accumulation_steps ?? (micro && total ? null : 1);
  const whole = (value) => Number.isInteger(value) && value > 0;
  if (total === undefined && micro === undefined) {
    return [{ path: "train_micro_batch_size_per_gpu", message: "no batch size: DeepSpeed stops at initialize()", cure: "1" }];
  }
  if (!whole(total) || !whole(micro)) return [];
  const product = micro * (steps ?? 1) * ranks;
  if (whole(steps) ? product === total : total % product === 0) return [];
  const sum = `${total} is not ${micro} micro × ${steps ?? "n"} accumulation × ${ranks} ranks`;
  return [{ path: "train_batch_size", message: `${sum}: AssertionError at initialize()`, cure: String(product) }];
}

export { check, nearest };
