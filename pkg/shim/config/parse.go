package config

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// parse overrides the keys of f that r sets. A key that does not exist is an
// error: it is a typing error more often than not, and would go unnoticed.
func parse(r io.Reader, name string, f *file) error {
	d := toml.NewDecoder(r)
	d.DisallowUnknownFields()
	err := d.Decode(f)
	if err == nil {
		return nil
	}
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var keys []string
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(e.Key(), "."), line))
		}
		return fmt.Errorf("configuration %s: unknown keys: %s", name, strings.Join(keys, ", "))
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		line, column := wrong.Position()
		return fmt.Errorf("configuration %s: line %d column %d: %w", name, line, column, err)
	}
	return fmt.Errorf("configuration %s: %w", name, err)
}
