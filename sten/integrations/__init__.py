"""What other libraries need to know of sten; `import sten` loads none of it."""
