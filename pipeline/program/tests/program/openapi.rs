//! Checks answers against the description of the control API: names, types, and required fields. Implements the
//! necessary part of JSON Schema.

use serde_json::Value;

const FILE: &str = include_str!("../../api/openapi.yaml");

pub(crate) struct OpenApi(Value);

impl OpenApi {
    pub(crate) fn read() -> Self {
        Self(serde_yaml_ng::from_str(FILE).expect("YAML"))
    }

    /// Does the value match the schema of this name, with no fields that are not described?
    #[track_caller]
    pub(crate) fn check(&self, name: &str, value: &Value) {
        let wrong = self.wrong(&self.0["components"]["schemas"][name], value, name);
        assert!(wrong.is_none(), "{} in {value:#}", wrong.unwrap_or_default());
    }

    /// The mismatch between a value and its schema, with its place.
    fn wrong(&self, schema: &Value, value: &Value, at: &str) -> Option<String> {
        if let Some(reference) = schema["$ref"].as_str() {
            let target = self.0.pointer(reference.strip_prefix('#').expect("a reference in the file"));
            return self.wrong(target.unwrap_or_else(|| panic!("{reference} leads nowhere")), value, at);
        }
        if let Some(choices) = schema["oneOf"].as_array() {
            let wrongs: Option<Vec<_>> = choices.iter().map(|choice| self.wrong(choice, value, at)).collect();
            return wrongs.map(|wrongs| wrongs.join(", or "));
        }
        assert!(schema.is_object(), "no schema for {at}");
        let types = match &schema["type"] {
            Value::Array(types) => types.clone(),
            one => vec![one.clone()],
        };
        if !types.iter().any(|name| is_of(name.as_str().expect("a type"), value)) {
            return Some(format!("{at} is {value}, not {types:?}"));
        }
        if schema["enum"].as_array().is_some_and(|known| !known.contains(value)) {
            return Some(format!("{at} is {value}, none of {}", schema["enum"]));
        }
        if schema.get("const").is_some_and(|only| only != value) {
            return Some(format!("{at} is {value}, not {}", schema["const"]));
        }
        if let Some(items) = value.as_array() {
            return items.iter().find_map(|item| self.wrong(&schema["items"], item, at));
        }
        let (Some(fields), Some(known)) = (value.as_object(), schema["properties"].as_object()) else { return None };
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        if let Some(missing) = required.into_iter().find(|name| !fields.contains_key(*name)) {
            return Some(format!("{at}.{missing} is missing"));
        }
        fields.iter().find_map(|(name, value)| match known.get(name) {
            Some(schema) => self.wrong(schema, value, &format!("{at}.{name}")),
            // Events have further fields, depending on their kind.
            None => (at != "EventLine").then(|| format!("{at}.{name} is not described")),
        })
    }
}

fn is_of(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type {other}"),
    }
}

#[test]
fn the_check_finds_what_is_wrong() {
    let api = OpenApi::read();
    let wrong = |name: &str, json: &str| {
        let value = serde_json::from_str(json).unwrap();
        api.wrong(&api.0["components"]["schemas"][name], &value, name).unwrap_or_default()
    };
    assert_eq!(wrong("Error", r#"{ "error": "no" }"#), "");
    assert_eq!(wrong("Error", "{}"), "Error.error is missing");
    assert_eq!(wrong("Error", r#"{ "error": "no", "more": 1 }"#), "Error.more is not described");
    assert!(wrong("Error", r#"{ "error": 5 }"#).contains("Error.error is 5"));
    assert!(wrong("Role", r#""both""#).contains("none of"));
    assert!(wrong("EventLine", r#"{ "ms": 1.5, "event": "paused", "role": 7 }"#).contains("EventLine.role"));
}
